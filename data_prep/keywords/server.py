"""An OpenAI-compatible chat server, asked by many threads; what fails in passing is asked again."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from csp_jax.errors import UserError
from csp_jax.text import Prompts
from data_prep.config import ServerKeywords
from data_prep.hashes import hash_of

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 60.0
WRONG_REQUEST = frozenset({400, 413, 422})  # this prompt cannot be answered; others can


class Server:
    """Greedy answers of a served model to the keyword prompt.

    A server that cannot be reached, refuses the key or knows no such model is a UserError: the run stops and can be
    resumed. A prompt that it refuses (too long, filtered) has no keyword.
    """

    def __init__(self, config: ServerKeywords, prompts: Prompts):
        self.config, self.prompts = config, prompts
        key = os.environ.get(config.key_variable, "") if config.key_variable else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._client = httpx.Client(headers=headers, timeout=config.timeout, limits=limits, trust_env=False)
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="keywords")
        asked = prompts.ask_keyword("{q}", "{r}")
        self.weights = config.model  # what weights a server runs, only its operator knows
        self.identity = hash_of(["server", config.model, asked, config.new_tokens])

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        """What the model says to each (question, response), asked at once up to `concurrency`."""
        return list(self._pool.map(lambda pair: self._ask(*pair), pairs))

    def _ask(self, question: str, response: str) -> str:
        body = {
            "model": self.config.model,
            "messages": [
                {"role": who, "content": words} for who, words in self.prompts.ask_keyword(question, response)
            ],
            "temperature": 0,
            "max_tokens": self.config.new_tokens,
        }
        problem = ""
        for attempt in range(self.config.retries + 1):
            wait = min(LONGEST_WAIT, self.config.backoff * 2**attempt)
            try:
                reply = self._client.post(f"{self.config.url.rstrip('/')}/chat/completions", json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code == 200:
                    return self._read(reply)
                if reply.status_code in WRONG_REQUEST:
                    return ""
                problem = f"HTTP {reply.status_code}: {reply.text[:200]}"
                if reply.status_code not in PASSING:
                    break
                wait = _asked_to_wait(reply, wait)
            if attempt < self.config.retries:
                time.sleep(wait)
        raise UserError(
            f"the server does not answer ({problem})",
            field="keywords.model.url",
            value=self.config.url,
            mend="Mend the server and run the same command again: it goes on where it stopped",
        )

    def _read(self, reply: httpx.Response) -> str:
        try:
            return reply.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(
                f"this is no chat completion: {reply.text[:200]!r}",
                field="keywords.model.url",
                value=self.config.url,
                mend="The address must be that of an OpenAI-compatible server, up to /v1",
            ) from None


def _asked_to_wait(reply: httpx.Response, otherwise: float) -> float:
    """The seconds of a Retry-After header, if it has one."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(reply.headers["retry-after"])))
    except (KeyError, ValueError):
        return otherwise
