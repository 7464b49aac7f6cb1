"""How fast the real programs are: the training step, the sampler and the evaluation pass, beside the machine's own
rate of matrix products.

made.py     models by their numbers, pictures and questions of stated lengths
work.py     what a window asks for: images, samples, tokens, useful FLOPs
tasks.py    what is timed
clock.py    turns, ratios by pairs, memory, what else the machine does
run.py      from configurations to rows
growth.py   how cost grows with responses and vocabulary
"""
