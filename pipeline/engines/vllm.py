"""Text from vLLM, in this process: for an evaluation, or beside the trainer on the same GPUs.

    engine = VllmEngine(base, tokenizer, stops, VllmSettings(dtype=torch.bfloat16, rows=256, max_length=4096))
    engine.update(policy)       the trainer's newest weights: an adapter alone by its folder, or all weights

Prompts that begin alike are read once (prefix caching). Under torchrun every process has its own engine; with
`tensor_parallel` consecutive processes share one, and all of them must make the same calls. Greedy tokens are those of
the transformers engine up to rounding; sampled ones are drawn from the same distribution by another generator.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipeline.core import heartbeat
from pipeline.core.errors import ArtifactError, DataError, LaunchError
from pipeline.core.files import read_json
from pipeline.engines.engine import Answer, Completion, Request, Sampling, Watch, seed_of
from pipeline.engines.text import before_stop, decode
from pipeline.models.weight_checks import NO_CODE
from pipeline.sizing.engines import ENVIRONMENT, LORA_RANKS, engine_rank, package_problems
from pipeline.sizing.model_sizes import GIB
from pipeline.workflow.weights import ADAPTER

CPU_BLOCK = 32  # tokens: what prompts share is cached in whole blocks; vLLM's default on a CPU is 128
CPU_CACHE = 4 * GIB  # bytes of keys and values on a CPU, at most
BATCHED = 8192  # tokens that one step reads, at least where a prompt is read whole
BESIDE = 4096  # tokens that one step reads beside a trainer, at most
ROWS = 256  # samples at once on a GPU, at least: vLLM lets those wait for which there is no memory
MEMORY_FOLDER = Path("/dev/shm")  # adapters are handed over here, where there is one
REFUSED_IN_ADAPTER = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "trainable_token_indices")

Gather = Callable[[Iterable[torch.nn.Parameter]], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class VllmSettings:
    """How an engine is made."""

    dtype: torch.dtype
    rows: int  # samples at once
    max_length: int  # tokens of a prompt and its completion, at most
    quantization: str = "none"  # none, or nf4 for a model that is quantized while it is loaded
    revision: str | None = None
    lora_rank: int | None = None  # of the adapters that it answers with; None: it answers with whole models alone
    trains: bool = False  # its weights are replaced by `update`
    gpu_memory: float = 0.9  # the share of the GPU that it takes
    sleep: bool = False  # give GPU memory back between two calls of `generate`
    tensor_parallel: int = 1
    eager: bool = False  # start without compiling: for a few answers
    use: str = "evaluate"  # whose setting chose the engine, for messages


class VllmEngine:
    """Completions of a base model in vLLM, with or without an adapter."""

    name = "vllm"

    def __init__(
        self,
        base: str,
        tokenizer: PreTrainedTokenizerBase,
        stops: Iterable[int],
        settings: VllmSettings,
        *,
        gather: Gather = lambda _: contextlib.nullcontext(),
    ) -> None:
        """Start vLLM. `gather` makes sharded parameters whole, as DeepSpeed's ZeRO-3 needs.

        Raises LaunchError if it cannot start, with the settings that may help.
        """
        self.tokenizer, self.stops, self.settings, self.gather = tokenizer, sorted(set(stops)), settings, gather
        self.key = f"cluster.generation.{settings.use}.engine"
        self.adapter: Any = None  # vLLM's LoRARequest
        self.inbox: list[Any] = []  # outputs that another call has computed
        self.updates = self.calls = 0
        self.sleeping: set[str] = set()  # of weights and kv_cache, as vLLM calls them: what has given its memory back
        if problems := list(package_problems(settings.quantization)):
            raise LaunchError(*(f"{self.key}: {text}" for text in problems))
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.core: Any = self._start(base)
        if "RANK" in os.environ:
            # it ends the process group, which is the stage's, whenever the engine's memory happens to be collected
            self.core.engine_core._finalizer.detach()
        self.limit = int(self.core.model_config.max_model_len)
        if settings.trains and settings.lora_rank is None and not all(p.numel() for p in self._model.parameters()):
            raise LaunchError(
                f"{self.key}: vLLM packs the weights on this processor, where they cannot be replaced. "
                f"Fix: {self.key}=transformers"
            )
        if settings.sleep:
            self._sleep()

    def _start(self, base: str) -> Any:
        """Return vLLM's engine."""
        from vllm import LLM
        from vllm import _custom_ops as operators
        from vllm.platforms import current_platform

        settings = self.settings
        arguments: dict[str, Any] = {}
        if current_platform.is_cpu():
            arguments = self._cpu_arguments(base)
            if settings.trains:
                operators._supports_onednn = False  # else weights are packed, and pushed ones would have no effect
        elif settings.trains:
            arguments = {"max_num_batched_tokens": BESIDE}  # vLLM keeps memory for as many, beside the trainer
        if "RANK" in os.environ:
            arguments["distributed_executor_backend"] = "external_launcher"
        if settings.lora_rank is not None:
            rank = engine_rank(settings.lora_rank)
            if rank is None:
                raise ArtifactError(
                    f"adapter: got rank {settings.lora_rank}; expected at most {LORA_RANKS[-1]}, the largest that vLLM "
                    f"computes. Fix: {self.key}=transformers"
                )
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        if settings.quantization == "nf4":
            arguments |= {"quantization": "bitsandbytes"}
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        try:
            return LLM(
                model=base,
                revision=settings.revision,
                trust_remote_code=False,
                skip_tokenizer_init=True,  # prompts come as tokens, and answers are decoded here
                generation_config="vllm",  # the checkpoint's own would change how tokens are drawn
                dtype=str(settings.dtype).removeprefix("torch."),
                max_model_len=settings.max_length,
                max_num_seqs=settings.rows,
                gpu_memory_utilization=settings.gpu_memory,
                enable_sleep_mode=settings.sleep,
                tensor_parallel_size=settings.tensor_parallel,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # of the distribution that a token is drawn from
                use_tqdm_on_load=False,
                enforce_eager=settings.eager or current_platform.is_cpu(),
                seed=0,
                **arguments,
            ).llm_engine
        except (ValueError, RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            raise LaunchError(self._explain(error)) from error
        finally:
            torch.set_num_threads = set_threads  # vLLM puts a function there that does nothing
            torch.set_num_threads(threads)

    def _cpu_arguments(self, base: str) -> dict[str, Any]:
        """Return the arguments of a CPU: memory for keys and values, and prompts that are read whole.

        A prompt that is read in parts would set back the random stream of its request, which a CPU's cannot.
        """
        config = AutoConfig.from_pretrained(base, revision=self.settings.revision, **NO_CODE)
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * self.settings.dtype.itemsize
        length = self.settings.max_length + 2 * CPU_BLOCK
        return {
            "kv_cache_memory_bytes": int(max(min(self.settings.rows * length * token, CPU_CACHE), length * token)),
            "block_size": CPU_BLOCK,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(BATCHED, self.settings.max_length),
        }

    def _explain(self, error: Exception) -> str:
        """Return why vLLM did not start, with the settings that may help."""
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        memory = self.key.replace("engine", "gpu_memory")
        more = f"another {memory} than {self.settings.gpu_memory:g}, or " if "emory" in first else ""
        return f"{self.key}: vLLM did not start: {first[:300]}. Fix: {more}{self.key}=transformers"

    # ---- weights

    @property
    def _model(self) -> Any:
        return self.core.model_executor.driver_worker.model_runner.model

    def load_adapter(self, folder: Path) -> None:
        """Answer with the adapter of a folder from now on. Raises ArtifactError if vLLM cannot compute it."""
        from vllm.lora.request import LoRARequest

        config = read_json(folder / ADAPTER)
        found = [name for name in REFUSED_IN_ADAPTER if isinstance(config, Mapping) and config.get(name)]
        if found:
            raise ArtifactError(
                f"adapter {folder}: {ADAPTER} sets {', '.join(found)}, which vLLM does not compute. "
                f"Fix: {self.key}=transformers"
            )
        before, self.updates = self.adapter, self.updates + 1
        request = LoRARequest(f"adapter-{self.updates}", self.updates, str(folder.absolute()))
        try:
            self.core.add_lora(request)  # under a number of its own: an adapter of before can never answer for it
        except (ValueError, RuntimeError, KeyError) as error:
            raise ArtifactError(
                f"adapter {folder}: vLLM does not load it: {str(error).strip()}. Fix: {self.key}=transformers"
            ) from error
        self.adapter = request
        if before is not None:
            self.core.remove_lora(before.lora_int_id)
        self.core.reset_prefix_cache()

    @torch.no_grad()
    def update(self, policy: Any) -> None:
        """Answer with the policy's present weights from now on: its adapter alone, or all of its weights.

        Every process calls it, because parameters that are shared out are gathered.
        """
        self._wake("weights")
        if self.settings.lora_rank is not None:
            self._hand_over(policy)
            return
        for name, parameter in policy.named_parameters():
            with self.gather([parameter]):
                self._model.load_weights([(name, parameter.data)])
        self.core.reset_prefix_cache()

    def _hand_over(self, policy: Any) -> None:
        """Write the policy's adapter into a folder in memory, and load it from there."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        own = [weights for name, weights in policy.named_parameters() if policy.prefix in name]
        with self.gather(own):
            state = get_peft_model_state_dict(policy, adapter_name="default", save_embedding_layers=False)
            kept = {
                name: weights.detach().to("cpu", self.settings.dtype).contiguous() for name, weights in state.items()
            }
        place = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="therefore-adapter-", dir=place) as folder:
            save_file(kept, Path(folder, "adapter_model.safetensors"))
            policy.peft_config["default"].save_pretrained(folder)
            self.load_adapter(Path(folder))

    # ---- memory between two generations

    def _sleep(self) -> None:
        """Give the GPU's memory back: weights that are pushed anew are dropped, a base waits in the host's memory."""
        self.core.sleep(level=1 if self.settings.lora_rank is not None else 2)
        self.sleeping = {"weights", "kv_cache"}

    def _wake(self, part: str) -> None:
        if part in self.sleeping:
            torch.cuda.empty_cache()  # what the optimizer left
            self.core.wake_up([part])
            self.sleeping.remove(part)

    def close(self) -> None:
        """Give back memory and processes."""
        from vllm.distributed import parallel_state

        self.core.engine_core._finalizer.detach()
        self.core.model_executor.shutdown()
        self.core = None
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:  # made of a process group that another engine may not find
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        if "RANK" not in os.environ and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # vLLM's own

    # ---- text

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, logprobs: bool = False, watch: Watch | None = None
    ) -> Iterator[Answer]:
        """Yield every sample of every request once, as they finish. Raises DataError for a prompt that is too long."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        longest = max((len(request.prompt) for request in requests), default=0)
        if longest >= self.limit:
            raise DataError(
                f"prompt: got {longest} tokens; expected fewer than {self.limit}, which vLLM reads of this model. "
                "Fix: leave the row out, or ask a shorter question"
            )
        self._wake("kv_cache")
        self.calls += 1
        waiting: dict[str, tuple[int, int]] = {}
        for index, request in enumerate(requests):
            prompt = list(request.prompt)
            for sample in request.numbers:
                name = f"{self.calls}/{index}/{sample}"
                waiting[name] = index, sample
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    repetition_penalty=sampling.repetition_penalty,
                    max_tokens=min(sampling.max_new_tokens, self.limit - len(prompt)),
                    seed=seed_of(request.seed, prompt, sample) if sampling.temperature else None,
                    stop_token_ids=self.stops,
                    ignore_eos=True,  # the stop tokens are those above, whatever the model's config names
                    logprobs=0 if logprobs else None,
                    detokenize=False,
                    output_kind=RequestOutputKind.CUMULATIVE if watch else RequestOutputKind.FINAL_ONLY,
                )
                self._add(name, prompt, params)
        try:
            for output in self._outputs(waiting):
                index, sample = waiting[output.request_id]
                ids = list(output.outputs[0].token_ids)
                if watch and ids:
                    watch(index, sample, ids)
                if output.finished:
                    del waiting[output.request_id]
                    yield Answer(index, sample, self._completion(ids, output.outputs[0].logprobs))
        finally:
            if self.core is not None:  # else it was closed in the meantime
                self.core.abort_request(list(waiting))
            self.inbox = [output for output in self.inbox if output.request_id not in waiting]
            if self.settings.sleep and self.core is not None:
                self._sleep()

    def _add(self, name: str, prompt: list[int], params: Any) -> None:
        self.core.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=self.adapter)

    def _outputs(self, mine: Mapping[str, object]) -> Iterator[Any]:
        """Yield outputs of the requests in `mine` until none is left; those of others wait for their own call."""
        while mine:
            own = [output for output in self.inbox if output.request_id in mine]
            if own:
                self.inbox = [output for output in self.inbox if output.request_id not in mine]
                yield from own
            elif not self.core.has_unfinished_requests():
                raise LaunchError(f"vLLM lost {len(mine)} requests. Fix: run the same command again")
            else:
                heartbeat.beat()
                self.inbox += self.core.step()

    def _completion(self, ids: list[int], scores: Any) -> Completion:
        text = decode(self.tokenizer, before_stop(ids, self.stops))
        found = [scores[k][token].logprob for k, token in enumerate(ids)] if scores is not None else None
        return Completion(text, ids, ids[-1] not in self.stops, found)

    def log_likelihood(self, ids: Sequence[int], labels: Sequence[int]) -> float:
        """Return the mean log-probability, in nats, of the tokens of one row whose label is not -100."""
        from vllm import SamplingParams

        if len(ids) >= self.limit:
            raise DataError(f"row: got {len(ids)} tokens; expected fewer than {self.limit}, which vLLM reads")
        self.calls += 1
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        waiting = {f"{self.calls}": 0}
        self._add(f"{self.calls}", list(ids), params)
        scored = [k for k in range(1, len(ids)) if labels[k] != -100]
        total = 0.0
        for output in self._outputs(waiting):
            if output.finished:
                waiting.clear()
                total = sum(output.prompt_logprobs[k][ids[k]].logprob for k in scored)
        return total / len(scored)


def adapter_rank(folder: Path) -> int:
    """Return the rank of an adapter, by its configuration. Raises ArtifactError if it names none."""
    config = read_json(folder / ADAPTER)
    rank = config.get("r") if isinstance(config, Mapping) else None
    if type(rank) is not int or rank < 1:
        raise ArtifactError(f"adapter {folder}: {ADAPTER}: r: got {rank!r}; expected a whole number of at least 1")
    return rank
