"""A port against its original: folders of weights, inputs and reference outputs, case by case."""
