"""The worker of `bench_kernels.py`, run by it once per engine: makes the data, computes and times what it is told to.

    python scripts/bench_kernels_worker.py jax|torch WORK

WORK is a JSON object that says what to compute. The first line out describes the engine; then each JSON line in, such
as {"do": "time", "form": "loss"}, is answered by one JSON line out. torch and Liger are no dependency of the project.
"""

import functools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

CEILING = 10.0  # upstream's; no divergence of this data reaches it
VOCAB_BLOCK = 4608  # of the low-memory mode
SAMPLED_ROWS = 512  # of each gradient, compared between the processes
PALLAS = {"gpu": ("pallas_gpu", "pallas_triton"), "tpu": ("pallas_tpu",)}
KERNEL_CALLS = re.compile(r'custom_call_target="(mosaic_gpu\w*|__gpu\$xla\.gpu\.triton|tpu_custom_call)"')
NAIVE, REFERENCE, UPSTREAM, LIGER = "naive", "naive, float32", "torch, upstream", "torch, Liger chunked"
MARK = "@reply "


# --- Both engines: the data, and what a form's first call takes ---


def make_data(work: dict[str, Any]) -> dict[str, Any]:
    """Hidden states, heads, ids and mask in numpy float32; the same in every process."""
    import numpy as np

    tokens, hidden, vocab = work["tokens"], work["hidden"], work["vocab"]
    rng = np.random.default_rng(0)
    data = {"hidden": rng.standard_normal((tokens, hidden), np.float32)}
    data["teacher_hidden"] = data["hidden"] + np.float32(0.3) * rng.standard_normal((tokens, hidden), np.float32)
    # Rows shifted by whole blocks are as random as new ones for the products, and far cheaper.
    block = rng.standard_normal((min(vocab, 8192), hidden), np.float32) * np.float32(3 / hidden**0.5)
    blocks = [np.roll(block, shift, axis=1) for shift in range(-(-vocab // len(block)))]
    data["head"] = np.concatenate(blocks)[:vocab]
    data["teacher_head"] = data["head"] + np.float32(0.02 / 3 * hidden**0.5) * np.roll(data["head"], 1, axis=0)
    data["targets"] = rng.integers(0, vocab, tokens, dtype=np.int32)
    data["mask"] = rng.permutation(tokens) < counted(work)
    return data


def counted(work: dict[str, Any]) -> int:
    """How many tokens the mask lets through."""
    return max(1, round(work["valid_share"] * work["tokens"]))


def sampled(rows: int) -> Any:
    """Indices of the rows of a gradient that are kept, the first and the last among them."""
    import numpy as np

    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(np.int32))


class ResidentMemory:
    """Growth of this process's resident memory to its peak, in bytes; None where the system does not say."""

    def __init__(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._read("VmRSS")
        except (OSError, KeyError):
            self.before = None

    def growth(self) -> int | None:
        """Since the object was made."""
        return None if self.before is None else max(0, self._read("VmHWM") - self.before)

    def _read(self, field: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(lines[field].split()[0]) * 1024


def timed(call) -> dict[str, float]:
    """Process and wall seconds of a call that ends when its results are there."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def best_rates(products: dict[str, Any], flops: float, clock: str) -> dict[str, float]:
    """FLOP/s of each product, the best of a few calls."""
    rates = {}
    for name, call in products.items():
        call()
        rates[name] = flops / max(min(timed(call)[clock] for _ in range(3 if clock == "cpu" else 10)), 1e-9)
    return rates


# --- JAX ---


class JaxEngine:
    """The forms in JAX, compiled one by one from the least memory to the most.

    An accelerator's allocator reports the peak since the process began, so a form's own peak is known only if no
    earlier one was higher.
    """

    def __init__(self, work: dict[str, Any]):
        import jax
        import jax.numpy as jnp

        self.work, self.device, self.calls = work, jax.devices()[0], {}
        data = make_data(work)
        dtype = jnp.dtype(work["dtype"])
        number = int(data["mask"].sum())
        self.mask = None if number == work["tokens"] else jnp.asarray(data["mask"])
        self.weights = jnp.asarray(data["mask"] / number, jnp.float32)
        self.targets = jnp.asarray(data["targets"])
        names = ("hidden", "head", "teacher_hidden", "teacher_head")
        # Cast before it is copied to the device, where a float32 copy would count as the peak of the first form.
        self.arrays = {name: jax.block_until_ready(jnp.asarray(data.pop(name).astype(dtype))) for name in names}

    def about(self) -> dict[str, Any]:
        """Device, versions and the forms in the order in which they are to be prepared."""
        import jax
        import jaxlib

        return {
            "device": self.device.device_kind,
            "platform": self.device.platform,
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
            "arguments": sum(array.nbytes for array in self.arrays.values()),
            "forms": list(self.forms()),
        }

    def forms(self) -> dict[str, dict[str, Any]]:
        """Name -> options of the public function; `sum` says that it is `fused_linear_jsd_loss`."""
        sizes = self.work["chunk_sizes"]
        pallas = PALLAS.get(self.device.platform, ())
        if self.work["head"] == "logprob":
            found = {"low memory": {"vocab_block": VOCAB_BLOCK}, "chunked": {}}
            found |= {f"chunked, {size}": {"chunk_size": size} for size in sizes}
            found |= {name: {"implementation": name} for name in pallas}
        else:
            found = {"low memory": {"vocab_block": VOCAB_BLOCK}, "per token": {}, "loss": {"sum": True}}
            found |= {f"loss, chunk {size}": {"sum": True, "chunk_size": size} for size in sizes}
            for name in pallas:
                found |= {name + ", per token": {"implementation": name}}
                found |= {name + ", loss": {"implementation": name, "sum": True}}
        if not pallas:
            found["pallas"] = {}
        found[NAIVE] = {"implementation": "reference", "sum": True}
        if self.work["dtype"] != "float32":
            found[REFERENCE] = {"implementation": "reference", "sum": True, "float32": True}
        return found

    def prepare(self, name: str, file: str) -> dict[str, Any]:
        """Compiles a form, calls it once and keeps its loss and some rows of its gradients in `file`."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        options = self.forms()[name]
        if name == "pallas":
            raise ValueError(f"there is no Pallas kernel for {self.device.platform}")
        arrays = tuple(self.arrays.values())
        if options.pop("float32", False):
            arrays = tuple(array.astype(jnp.float32) for array in arrays)
        started = time.perf_counter()
        compiled = jax.jit(self.function(options)).lower(*arrays).compile()
        seconds, memory, peak = time.perf_counter() - started, compiled.memory_analysis(), self.peak()
        (value, gradients), held = jax.block_until_ready(compiled(*arrays)), peak()
        rows = {f"gradient_{i}": found[sampled(len(found))] for i, found in enumerate(gradients)}
        np.savez(file, value=np.asarray(value), **{key: np.asarray(x, np.float32) for key, x in rows.items()})
        if name != REFERENCE:
            self.calls[name] = lambda: jax.block_until_ready(compiled(*arrays))
        row = {"temp": memory.temp_size_in_bytes, "output": memory.output_size_in_bytes, "compile_seconds": seconds}
        if options.get("implementation", "").startswith("pallas") and not KERNEL_CALLS.search(compiled.as_text()):
            row["note"] = "no kernel in the program: the plain row pass ran"
        return row | held

    def function(self, options: dict[str, Any]):
        """(hidden, head, teacher_hidden, teacher_head) -> (value, gradients)."""
        import jax
        import jax.numpy as jnp

        from unisd_jax.kernels import fused_linear_jsd, fused_linear_jsd_loss, fused_linear_logprob

        work, as_sum = self.work, options.pop("sum", False)
        options = options | {"mask": self.mask}
        if work["head"] == "logprob":

            def scores(hidden, head, *_):
                return jnp.stack(fused_linear_logprob(hidden, head, self.targets, **options)), ()

            return scores
        options |= {"alpha": work["alpha"], "quantile": work["quantile"]}
        options |= {} if work["quantile"] else {"ceiling": CEILING}

        def loss(*arrays):
            if as_sum:
                return fused_linear_jsd_loss(*arrays, self.targets, self.weights, **options)[0]
            return jnp.sum(self.weights * fused_linear_jsd(*arrays, self.targets, **options).clipped_divergence)

        return jax.value_and_grad(loss, (0, 1) if work["head"] == "trained" else (0,))

    def peak(self):
        """A function that says how much more memory than now was held since now, at most."""
        if self.device.platform == "cpu":
            memory = ResidentMemory()
            return lambda: {"peak": memory.growth()}
        before = self.device.memory_stats() or {}

        def growth():
            now = self.device.memory_stats() or {}
            if not {"peak_bytes_in_use", "bytes_in_use"} <= before.keys() & now.keys():
                return {"peak": None}
            hidden = now["peak_bytes_in_use"] == before["peak_bytes_in_use"]
            return {"peak": now["peak_bytes_in_use"] - before["bytes_in_use"], "peak_is_bound": hidden}

        return growth

    def rates(self) -> dict[str, float]:
        """FLOP/s of the products that the loss is made of."""
        import jax
        import jax.numpy as jnp

        hidden, head = self.arrays["hidden"], self.arrays["head"]
        factor = jnp.ones((len(hidden), len(head)), hidden.dtype)
        dot = functools.partial(
            jnp.einsum, precision=jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        )
        products = {}
        for name, axes, a, b in (
            ("forward", "nh,vh->nv", hidden, head),
            ("hidden gradient", "nv,vh->nh", factor, head),
            ("head gradient", "nv,nh->vh", factor, hidden),
        ):
            compiled = jax.jit(functools.partial(dot, axes)).lower(a, b).compile()
            products[name] = functools.partial(lambda run, *ab: jax.block_until_ready(run(*ab)), compiled, a, b)
        return best_rates(products, 2.0 * factor.size * hidden.shape[1], clock_of(self.device.platform))


# --- torch ---


class TorchEngine:
    """The upstream form and Liger's in torch, on its GPU if it has one."""

    def __init__(self, work: dict[str, Any]):
        import torch

        self.torch, self.work, self.calls = torch, work, {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, work["dtype"])
        data = {name: torch.from_numpy(values) for name, values in make_data(work).items()}
        self.mask, self.targets = (data.pop(name).to(self.device) for name in ("mask", "targets"))
        self.targets = self.targets.long()
        self.arrays = {name: data.pop(name).to(self.device).to(dtype) for name in list(data)}

    def about(self) -> dict[str, Any]:
        """Device, versions and forms."""
        torch, on_gpu = self.torch, self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "platform": "gpu" if on_gpu else "cpu",
            "versions": {"torch": torch.__version__},
            "forms": list(self.forms()),
        }

    def forms(self) -> dict[str, Any]:
        """Name -> a function of nothing that gives (value, gradients)."""
        if self.work["head"] == "logprob":
            return {UPSTREAM: self.score}
        found = {UPSTREAM: functools.partial(self.differentiate, self.upstream)}
        if self.work["head"] == "trained":
            # Liger's always computes the head's gradient too, and it has no clip.
            size = (self.work["chunk_sizes"] or [1024])[0]
            found[LIGER] = functools.partial(self.differentiate, functools.partial(self.liger, size, False))
            if self.work["dtype"] != "float32":
                float32 = functools.partial(self.liger, size, True)
                found[f"{LIGER}, float32 math"] = functools.partial(self.differentiate, float32)
        return found

    def differentiate(self, loss) -> tuple:
        """The loss and its gradients."""
        arrays = {name: array.detach() for name, array in self.arrays.items()}
        trained = ("hidden", "head") if self.work["head"] == "trained" else ("hidden",)
        for name in trained:
            arrays[name].requires_grad_()
        value = loss(**arrays)
        value.backward()
        return value.detach(), [arrays[name].grad for name in trained]

    def upstream(self, hidden, head, teacher_hidden, teacher_head):
        """All logits, both log-softmaxes, kl_div with log targets, clamp, mean; under autocast for bfloat16."""
        torch, alpha = self.torch, self.work["alpha"]
        kl = functools.partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.work["dtype"] == "bfloat16"):
            with torch.no_grad():
                teacher = torch.log_softmax(teacher_hidden @ teacher_head.T, dim=-1)
            student = torch.log_softmax(hidden @ head.T, dim=-1)
            if alpha == 0:
                divergence = kl(student, teacher)
            elif alpha == 1:
                divergence = kl(teacher, student)
            else:
                share = torch.tensor(alpha, dtype=student.dtype, device=student.device)
                parts = torch.stack([student + torch.log(1 - share), teacher + torch.log(share)])
                mixture = torch.logsumexp(parts, dim=0)
                divergence = share * kl(mixture, teacher) + (1 - share) * kl(mixture, student)
            divergence, ceiling = divergence.sum(dim=-1), CEILING
            if self.work["quantile"]:
                counted = divergence.detach()[self.mask].float()
                ceiling = torch.quantile(counted, self.work["quantile"]).clamp(min=1e-6)
            return (divergence.clamp(max=ceiling) * self.mask).sum() / self.mask.sum()

    def liger(self, size: int, float32: bool, hidden, head, teacher_hidden, teacher_head):
        """Liger's chunked JSD without its hard loss; `float32`: the logits, bfloat16 products, are cast first."""
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction as Plain

        class InFloat32(Plain):
            """The same with everything after the products in float32."""

            @staticmethod
            def distillation_loss_fn(student_logits, teacher_logits, **options):
                return Plain.distillation_loss_fn(student_logits.float(), teacher_logits.float(), **options)

        labels = self.torch.where(self.mask, self.targets, -100)
        # hard and soft weight, beta, ignored label, temperature, compiled, chunk
        settings = (0.0, 1.0, self.work["alpha"], -100, 1.0, self.device.type == "cuda", size)
        function = InFloat32 if float32 else Plain
        return function.apply(hidden, head, teacher_hidden, teacher_head, labels, None, None, *settings)

    def score(self) -> tuple:
        """Log-probs and entropies from all logits, under autocast for bfloat16; no gradients."""
        torch = self.torch
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.work["dtype"] == "bfloat16"),
        ):
            log_probs = torch.log_softmax(self.arrays["hidden"] @ self.arrays["head"].T, dim=-1)
            found = log_probs.gather(-1, self.targets[:, None])[:, 0]
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            return torch.stack([found, entropy]) * self.mask, ()

    def prepare(self, name: str, file: str) -> dict[str, Any]:
        """Calls a form once, twice on a GPU, and keeps its loss and some rows of its gradients in `file`."""
        import numpy as np

        torch, call = self.torch, self.forms()[name]
        if self.device.type == "cuda":
            call()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            value, gradients = call()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            memory = ResidentMemory()
            value, gradients = call()
            peak = memory.growth()
        rows = {
            f"gradient_{i}": found[torch.from_numpy(sampled(len(found))).to(found.device)].float().cpu().numpy()
            for i, found in enumerate(gradients)
        }
        np.savez(file, value=value.float().cpu().numpy(), **rows)
        self.calls[name] = functools.partial(self.finish, call)
        return {"peak": peak}

    def finish(self, call) -> None:
        """The call, and the wait for a GPU's results."""
        call()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def rates(self) -> dict[str, float]:
        """FLOP/s of the products that the loss is made of."""
        hidden, head = self.arrays["hidden"], self.arrays["head"]
        factor = self.torch.ones((len(hidden), len(head)), dtype=hidden.dtype, device=self.device)
        products = {
            "forward": lambda: hidden @ head.T,
            "hidden gradient": lambda: factor @ head,
            "head gradient": lambda: factor.T @ hidden,
        }
        products = {name: functools.partial(self.finish, call) for name, call in products.items()}
        flops = 2.0 * factor.numel() * hidden.shape[1]
        return best_rates(products, flops, clock_of("cpu" if self.device.type == "cpu" else "gpu"))


# --- The protocol ---


def serve(engine: str, work: dict[str, Any]) -> int:
    """Answers one JSON line on stdout for each on stdin."""
    runner = (JaxEngine if engine == "jax" else TorchEngine)(work)
    reply(runner.about())
    for line in sys.stdin:
        command = json.loads(line)
        try:
            match command["do"]:
                case "prepare":
                    reply(runner.prepare(command["form"], command["file"]))
                case "rates":
                    reply(runner.rates())
                case "time":
                    reply(timed(runner.calls[command["form"]]))
        except Exception as error:  # a form that is not available is a row that says why
            reply({"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
    return 0


def reply(answer: dict[str, Any]) -> None:
    """One line that the parent can tell from whatever a library prints."""
    print(MARK + json.dumps(answer), flush=True)


def clock_of(platform_name: str) -> str:
    """Process time on a CPU, where other processes may be working too."""
    return "cpu" if platform_name == "cpu" else "wall"


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], json.loads(sys.argv[2])))
