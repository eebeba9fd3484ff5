"""vLLM as an engine: the only module that imports vllm. Known generation: 0.32, its V1 engine stepped in this process.

The engine core is not asked over a queue but stepped here, token by token, so a swap lies strictly between two tokens and no
request has to be paused. Weights go through vLLM's layerwise reload. One failure of it is silent and repaired here: with tied
embeddings the CPU build keeps a packed copy of the old output head, and decodes with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamopd.errors import ConfigError, TornWeights
from streamopd.schemas import Finish, Span, Weights

from .coming import Coming, Loader
from .engine import Answer, Request, Swapped, error_answer

for _name, _value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("VLLM_CPU_KVCACHE_SPACE", "1"),
                      ("VLLM_LOGGING_LEVEL", "ERROR"), ("VLLM_NO_USAGE_STATS", "1"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)  # read by vllm when it is imported
if not torch.cuda.is_available():  # it would compile two small functions of its sampler: that takes a C++ compiler, and longer than they do
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

REASONS = {"stop": Finish.STOP, "length": Finish.LENGTH}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SERVED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of one product, relative


class VllmEngine:
    """An Engine over vLLM. Mates of a group fill their prompt once: vLLM's prefix cache, whose salt is new with every swap.

    The salt counts swaps, because version numbers come back in a run that is rebuilt. Blocks of an old salt are found by nobody
    new and leave with the least recently used. A mate is a request of its own: vLLM's `n` shares no more than the cache does, and
    ties the seeds and the ends of a group together.
    """

    def __init__(
        self, *, folder: Path, stop_ids: Sequence[int], loader: Loader, max_inflight: int, temperature: float = 1.0,
        top_p: float = 1.0, student_k: int = 0, kv: str = "keep", dtype: str = "float32", memory_fraction: float = 0.5,
        sleeps: bool = False,
    ) -> None:
        if kv != "keep":
            raise ConfigError(f'generator.kv is {kv!r}; vLLM keeps keys and values across a swap. Set it to "keep", or use engine "hf".')
        if student_k and (temperature, top_p) != (1.0, 1.0):
            raise ConfigError(
                f"The method wants the student's own top ids at temperature 1; vLLM tells them at generator.temperature = {temperature} "
                f"and top_p = {top_p}. Set both to 1, or use engine \"hf\"."
            )
        if sleeps and not current_platform.is_sleep_mode_available():
            raise ConfigError(
                f"generator.sleep_after_s wants an engine that can sleep; vLLM cannot on this {current_platform.device_type}. Set it to 0."
            )
        if current_platform.is_cpu():
            require_kernels(torch.ops._C)
        self.version = -1
        self._slots, self._k = max_inflight, student_k
        self._temperature, self._top_p, self._stop_ids = temperature, top_p, sorted(stop_ids)
        self._engine = LLMEngine.from_engine_args(EngineArgs(
            model=str(folder), dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=True, enforce_eager=True,
            max_num_seqs=max_inflight, logprobs_mode="processed_logprobs", max_logprobs=max(student_k, 1), seed=0,
            async_scheduling=False, gpu_memory_utilization=memory_fraction, enable_sleep_mode=sleeps,
            worker_extension_cls=f"{__name__}.WeightTaker",
            enable_chunked_prefill=not current_platform.is_cpu(),  # no CPU generator takes back what was drawn for half a prompt
        ))
        self._coming = Coming(loader, self._engine.model_config.dtype)
        self._longest = int(self._engine.model_config.max_model_len)
        self._requests: dict[str, Request] = {}
        self._refused: list[Answer] = []
        self._swaps, self._probes = 0, 0

    @property
    def inflight(self) -> int:
        return len(self._requests) + len(self._refused)

    @property
    def inflight_tokens(self) -> int:
        return sum(request.tokens for request in self._requests.values())

    @property
    def free(self) -> int:
        return max(0, self._slots - self.inflight)

    def admit(self, requests: Sequence[Request]) -> None:
        assert len(requests) <= self.free, f"{len(requests)} requests for {self.free} free slots"
        assert not any(request.behaviour.author for request in requests), "this engine lets nobody but the student write"
        for request in requests:
            if request.tokens > self._longest:
                error = f"{len(request.prompt_ids)} + {request.max_new} tokens are more than the model's {self._longest}"
                self._refused.append(error_answer(request, error, self._temperature, self._top_p))
                continue
            self._requests[request.id] = request
            self._queue(request)

    def step(self) -> list[Answer]:
        answers, self._refused = self._refused, []
        if self._requests:
            answers += [self._answer(output) for output in self._engine.step() if output.finished and output.request_id in self._requests]
        return answers

    def prepare(self, manifest: Weights, weights_dir: Path) -> None:
        self._coming.prepare(manifest, weights_dir)

    def swap_in(self, manifest: Weights, weights_dir: Path) -> Swapped:
        started = time.perf_counter()
        with self._coming.take(manifest, weights_dir) as fresh:
            wrong = self._engine.collective_rpc("take_weights", args=(fresh,))
        for told in filter(None, wrong):  # the old ones are gone: nothing may be written with what is there
            raise TornWeights(f"After the swap to weights {manifest.n}, vLLM does not serve them: {told} Restart this replica.")
        self.version, self._swaps = manifest.n, self._swaps + 1
        self._engine.set_weight_version(str(manifest.n))
        self._queue_anew()
        return Swapped(version=manifest.n, inflight=self.inflight, pause_s=time.perf_counter() - started)

    def probe(self, ids: list[int]) -> NDArray[np.float32]:
        assert not self._requests, "a probe wants the engine to itself"
        self._probes += 1
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        self._engine.add_request(f"probe{self._probes}", _prompt(ids, f"probe {self._probes}"), params)
        while True:
            for output in self._engine.step():
                if output.finished:
                    told = output.prompt_logprobs[1:]
                    return np.array([row[token].logprob for row, token in zip(told, ids[1:], strict=True)], np.float32)

    def abort(self) -> list[Request]:
        dropped = list(self._requests.values()) + [answer.request for answer in self._refused]
        self._engine.abort_request(list(self._requests))
        self._requests, self._refused = {}, []
        return dropped

    def sleep(self) -> None:
        """Weights to the host's memory, caches dropped."""
        assert not self._requests, "requests in flight would lose their caches"
        self._engine.sleep(level=1)

    def wake(self) -> None:
        self._engine.wake_up()

    # ---------------------------------------------------------------- one request
    def _queue(self, request: Request) -> None:
        self._engine.add_request(request.id, _prompt(request.prompt_ids, f"swap {self._swaps}"), self._sampling(request))

    def _queue_anew(self) -> None:
        """What has not written a token begins again: old weights may have filled a part of its prompt, or of its mates'."""
        begun = self._engine.output_processor.request_states.values()
        unwritten = [state.external_req_id for state in begun if state.is_prefilling]
        self._engine.abort_request(unwritten)
        for name in unwritten:
            self._queue(self._requests[name])

    def _sampling(self, request: Request) -> Any:
        seed = int(np.random.SeedSequence(request.seed).generate_state(1, np.uint32)[0])
        return SamplingParams(
            temperature=self._temperature, top_p=self._top_p, max_tokens=request.max_new, logprobs=self._k, seed=seed,
            stop_token_ids=self._stop_ids, detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _answer(self, output: Any) -> Answer:
        request, said = self._requests.pop(output.request_id), output.outputs[0]
        ids_G = np.asarray(said.token_ids, np.int32)
        if said.finish_reason not in REASONS:
            return error_answer(request, f"vLLM ended it with {said.finish_reason!r}", self._temperature, self._top_p)
        flat = said.logprobs
        firsts = np.asarray(flat.start_indices)
        told_ids, told_logp = np.asarray(flat.token_ids, np.int32), np.asarray(flat.logprobs, np.float32)
        assert (told_ids[firsts] == ids_G).all(), "the sampled id comes first in its row"
        topk_ids, topk_logprobs = self._topk(told_ids, told_logp, flat)
        return Answer(
            request=request, completion_ids=ids_G, logprobs=np.minimum(told_logp[firsts], 0), finish=REASONS[said.finish_reason],
            spans=[Span(span.start, _version(span.version), "keep") for span in said.weight_versions],
            temperature=self._temperature, top_p=self._top_p, topk_ids=topk_ids, topk_logprobs=topk_logprobs,
        )

    def _topk(self, ids: NDArray[np.int32], logp: NDArray[np.float32], flat: Any) -> tuple[Any, Any]:
        """([G, k], [G, k]) the most probable first; a row also names the sampled id, which may be one of them."""
        if not self._k:
            return None, None
        rows = []
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
            unique = dict(zip(ids[start:end].tolist(), logp[start:end].tolist(), strict=True))
            rows.append(sorted(unique.items(), key=lambda pair: -pair[1])[: self._k])
        table = np.array(rows, np.float64).reshape(len(rows), -1, 2)
        return table[..., 0].astype(np.int32), table[..., 1].astype(np.float16)


def require_kernels(ops: Any) -> None:
    """ConfigError when vLLM imported without its kernels for a CPU, which it only warns of."""
    if not hasattr(ops, "init_cpu_memory_env"):
        raise ConfigError(
            "vLLM's kernels for this CPU did not load; what they want and a system may lack is libnuma.so.1. "
            "Install it (Debian: apt install libnuma1)."
        )


class WeightTaker:
    """What vLLM's worker is extended by; it runs where the model is."""

    repairs_head = True  # a test switches it off to see the drill refuse

    def take_weights(self, fresh: Mapping[str, Tensor]) -> str:
        """Load HF tensors in place; what is not served afterwards, "" when all is. The engine is of this process: nothing is sent."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        with torch.inference_mode():
            initialize_layerwise_reload(model)
            model.load_weights(iter(fresh.items()))
            finalize_layerwise_reload(model, self.model_runner.model_config)  # type: ignore[attr-defined]
            if WeightTaker.repairs_head:
                _repair_head(model, fresh)
            return next(_not_served(model, fresh), "")


def _repair_head(model: nn.Module, fresh: Mapping[str, Tensor]) -> None:
    """A tied head is the embedding; on a CPU it holds a packed copy that nobody renews."""
    if "lm_head.weight" not in fresh:
        head, embedding = model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")
        head.tie_weights(embedding)  # type: ignore[operator]
        head.quant_method.process_weights_after_loading(head)  # type: ignore[operator, union-attr]


def _not_served(model: nn.Module, fresh: Mapping[str, Tensor]) -> Iterator[str]:
    """Sentences about modules whose products are not those of the fresh weights, for one random vector each."""
    for name, module in model.named_modules():
        weight, bias = _whole(name, "weight", fresh), _whole(name, "bias", fresh)
        if name == "lm_head" and weight is None:
            weight = fresh["model.embed_tokens.weight"]
        if weight is None:
            continue
        if weight.ndim == 2 and hasattr(module, "quant_method") and not name.endswith("embed_tokens"):
            x_D = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
            own = next(module.parameters())
            served = module.quant_method.apply(module, x_D.to(own.device), getattr(module, "bias", None)).cpu()[:, : len(weight)]  # type: ignore[operator, union-attr]
            wanted = nn.functional.linear(x_D, weight, bias)
        else:
            served, wanted = module.weight[: len(weight)].cpu(), weight  # type: ignore[index]
        error = float((served.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6))
        if not error <= SERVED_ERROR[weight.dtype]:
            yield f"{name} is {error:.2g} away from the weights of the folder, {SERVED_ERROR[weight.dtype]:.2g} is allowed."


def _whole(name: str, kind: str, fresh: Mapping[str, Tensor]) -> Tensor | None:
    """A module's tensor as it is published; vLLM fuses some into one."""
    parent, _, leaf = name.rpartition(".")
    parts = [f"{parent}.{part}.{kind}" for part in FUSED.get(leaf, (leaf,))] if parent else [f"{leaf}.{kind}"]
    found = [fresh[part] for part in parts if part in fresh]
    return torch.cat(found) if len(found) == len(parts) and found else None


def _prompt(ids: Sequence[int] | NDArray[np.int32], salt: str) -> dict[str, Any]:
    """Blocks of keys and values are shared under one salt only."""
    return {"prompt_token_ids": [int(i) for i in ids], "cache_salt": salt}


def _version(name: str) -> int:
    return int(name) if name.lstrip("-").isdigit() else -1
