"""Servers that speak as vLLM 0.32, SGLang and an OpenAI-compatible server do, over the quickstart's teacher.

Written from their sources and documentation; tests/score/test_vllm_serve.py holds the first and the third to the real thing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streamopd.assets import resolve
from streamopd.assets.vocabulary import texts
from streamopd.score.local import load_model
from tests.score.servers import MODEL

ROOM = 128  # tokens of the model
Table = NDArray[np.float32]
Change = Callable[[Table], Table]


class Refused(Exception):
    """Becomes a 400."""


class Stranger:
    """The model behind every API here. `change` is what it does to its tables [L, V]: row t speaks of token t + 1."""

    def __init__(self, cap: int = -1, change: Change = lambda table: table, vocabulary: dict[int, str] | None = None) -> None:
        folder = resolve(MODEL)
        self.model, self.texts = load_model(folder, "float32"), vocabulary or texts(folder)
        self.cap, self.change, self.asked = cap, change, 0
        self.says: Any = None  # to whoever asks about more than two ids, whatever that is

    @torch.inference_mode()
    def table(self, ids: list[int]) -> Table:
        if max(ids) >= 19:
            raise Refused(f"Token id {max(ids)} is out of vocabulary")
        if len(ids) >= ROOM:
            raise Refused(f"the prompt has {len(ids)} tokens, the model takes {ROOM - 1} and writes one")
        self.asked += len(ids)
        return self.change(torch.log_softmax(self.model(input_ids=torch.tensor([ids])).logits[0].float(), -1).numpy())

    def need(self, k: int) -> int:
        if self.cap >= 0 and (k < 0 or k > self.cap):
            raise Refused(f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}")
        return 19 if k < 0 else k

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "teacher", "object": "model", "max_model_len": ROOM}]})


def app(stranger: Stranger, **posts: Callable[[dict[str, Any]], Any]) -> Starlette:
    """`/v1/models`, and a POST for each path ("_" stands for "/")."""
    def route(path: str, answer: Callable[[dict[str, Any]], Any]) -> Route:
        async def reply(request: Request) -> Response:
            try:
                return JSONResponse(answer(await request.json()))
            except Refused as error:
                return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)

        return Route("/" + path.replace("_", "/"), reply, methods=["POST"])

    return Starlette(routes=[Route("/v1/models", stranger.models), *(route(path, answer) for path, answer in posts.items())])


def best(row: Table, k: int) -> list[int]:
    return [int(i) for i in np.argsort(-row)[:k]]


# ---------------------------------------------------------------- vLLM
def vllm(stranger: Stranger, scores_ids: bool = False) -> Starlette:
    def prompt_logprobs(ids: list[int], k: int) -> list[dict[str, Any] | None]:
        rows: list[dict[str, Any] | None] = [None]
        for row, own in zip(stranger.table(ids), ids[1:], strict=False):
            told = dict.fromkeys([own, *best(row, k)])
            rows.append({str(i): {"logprob": max(float(row[i]), -9999.0), "rank": 1, "decoded_token": stranger.texts[i]} for i in told})
        return rows

    def completions(body: dict[str, Any]) -> Any:
        k = stranger.need(body["prompt_logprobs"])
        if stranger.says and len(body["prompt"][0]) > 2:
            return stranger.says
        return {"choices": [{"index": i, "text": "", "prompt_logprobs": prompt_logprobs(p, k)} for i, p in enumerate(body["prompt"])]}

    def generate(body: dict[str, Any]) -> Any:
        if not scores_ids:
            raise Refused("Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.")
        sampling, ids = body["sampling_params"], body["token_ids"]
        if stranger.says and len(ids) > 2:
            return stranger.says
        rows, first = np.array(sampling["prompt_logprob_token_ids"]), sampling["prompt_logprob_start"]
        if len(rows) != len(ids) - 1 - first:
            raise Refused(f"prompt_logprob_token_ids has {len(rows)} rows, but the prompt has {len(ids) - 1 - first} scored rows")
        said = np.take_along_axis(stranger.table(ids)[first:-1], np.maximum(rows, 0), 1).astype(np.float32)
        buffer = io.BytesIO()
        np.save(buffer, said, allow_pickle=False)
        k = sampling.get("prompt_logprobs")
        return {
            "choices": [], "prompt_token_id_logprobs": base64.b64encode(buffer.getvalue()).decode(),
            "prompt_logprobs": prompt_logprobs(ids, stranger.need(k)) if k else None,
        }

    return app(stranger, v1_completions=completions, inference_v1_generate=generate)


# ---------------------------------------------------------------- SGLang
def sglang(stranger: Stranger) -> Starlette:
    def one(ids: list[int], first: int, k: int) -> Any:
        table = stranger.table(ids)
        own: list[Any] = [[None, ids[first], stranger.texts[ids[first]]]]
        top: list[Any] = [None]
        for t in range(first, len(ids) - 1):
            own.append([float(table[t, ids[t + 1]]), ids[t + 1], stranger.texts[ids[t + 1]]])
            top.append([[float(table[t, i]), i, stranger.texts[i]] for i in best(table[t], k)])
        return {"text": "", "meta_info": {"input_token_logprobs": own} | ({"input_top_logprobs": top} if k else {})}

    def generate(body: dict[str, Any]) -> Any:
        if body["top_logprobs_num"] > 19:
            raise Refused("selected index k out of range")
        return [one(ids, body["logprob_start_len"], body["top_logprobs_num"]) for ids in body["input_ids"]]

    return app(stranger, generate=generate)


# ---------------------------------------------------------------- any OpenAI-compatible one that echoes
def completions(stranger: Stranger, knows_ids: bool) -> Starlette:
    def one(index: int, ids: list[int], k: int, as_ids: bool) -> Any:
        def named(i: int) -> str:
            return f"token_id:{i}" if as_ids else stranger.texts[i]

        own: list[float | None] = [None]
        top: list[dict[str, float] | None] = [None]
        for row, token in zip(stranger.table(ids), ids[1:], strict=False):
            own.append(float(row[token]))
            top.append({named(i): float(row[i]) for i in dict.fromkeys([token, *best(row, k)])})
        columns = {"tokens": [named(i) for i in ids], "token_logprobs": own, "top_logprobs": top}
        return {"index": index, "text": "", "logprobs": columns}

    def echo(body: dict[str, Any]) -> Any:
        assert body["echo"]
        assert body["max_tokens"] == 0
        as_ids = knows_ids and body.get("return_tokens_as_token_ids", False)
        k = stranger.need(body["logprobs"])
        return {"choices": [one(i, ids, k, as_ids) for i, ids in enumerate(body["prompt"])]}

    return app(stranger, v1_completions=echo)
