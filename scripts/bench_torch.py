"""The torch half of `bench_against_torch.py`, run by it in its own environment: same weights, same tokens, same loss.

Needs torch and transformers; prints one JSON line of seconds per workload. torch is no dependency of the project.
"""

import json
import resource
import sys

import bench_timing


def main() -> None:
    """Measures the workloads given as JSON in the first argument."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    work = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    model.requires_grad_(False).eval()
    vocabulary = model.config.vocab_size

    def tokens(seed, shape):
        return torch.from_numpy(np.random.default_rng(seed).integers(100, vocabulary, shape)).long()

    def seconds(call):
        return bench_timing.seconds(call, work["repeats"])

    results = {"versions": {"torch": torch.__version__}}
    sampler = work["sampler"]
    prompts = tokens(0, (sampler["batch"], sampler["prompt"]))

    def sample():
        with torch.inference_mode():
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
                min_new_tokens=sampler["new"], max_new_tokens=sampler["new"], pad_token_id=0,
            )  # fmt: skip

    results["sampler"] = {"seconds": seconds(sample)}

    product, mix = work["pieces"].values()

    def normal(seed, *shape):
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))

    x, weight = normal(4, product["tokens"], product["inputs"]), normal(5, product["inputs"], product["outputs"])

    def products():
        for _ in range(product["calls"]):
            x @ weight

    batch, length, dim = mix["batch"], mix["length"], mix["dim"]
    query = normal(6, batch, mix["heads"], length, dim).requires_grad_()
    key, value = (normal(seed, batch, mix["kv_heads"], length, dim).requires_grad_() for seed in (7, 8))

    def attend():
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad((mixed**2).sum(), (query, key, value))

    calls = (products, attend)
    results |= {name: {"seconds": seconds(call)} for name, call in zip(work["pieces"], calls, strict=True)}

    add_lora(model, work["rank"])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    for name, shape in work["steps"].items():
        student, teacher = (
            tokens(seed, (shape["batch"], shape[who])) for seed, who in ((1, "student"), (2, "teacher"))
        )
        completion = tokens(3, (shape["batch"], shape["completion"]))

        def logits(prompt, completion=completion):
            ids = torch.cat([prompt, completion[:, :-1]], dim=1)
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, prompt.shape[1] - 1 :]
            return model.lm_head(hidden)

        def loss(student=student, teacher=teacher, logits=logits):
            switch_lora(model, False)
            with torch.no_grad():
                teacher_logp = torch.log_softmax(logits(teacher), dim=-1)
            switch_lora(model, True)
            student_logp = torch.log_softmax(logits(student), dim=-1)
            return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1).mean()

        def step(loss=loss):
            optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()

        reset_lora(model)
        with torch.no_grad():
            first = float(loss())
        results[name] = {"loss": first, "seconds": seconds(step)}
    results["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(results))


def add_lora(model, rank: int) -> None:
    """Wraps the seven projections of every layer: y = W x + 2 · B A x."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.active = base, True
            self.a = torch.nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
            self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))

        def forward(self, x):
            y = self.base(x)
            return y + 2.0 * ((x @ self.a.T) @ self.b.T) if self.active else y

    for layer in model.model.layers:
        for block, names in ((layer.self_attn, "q k v o"), (layer.mlp, "gate up down")):
            for name in names.split():
                setattr(block, f"{name}_proj", Adapted(getattr(block, f"{name}_proj")))
    switch_lora(model, True)


def switch_lora(model, active: bool) -> None:
    """Turns all adapters on (the student) or off (the frozen teacher)."""
    for module in model.modules():
        if hasattr(module, "active"):
            module.active = active


def reset_lora(model) -> None:
    """Back to an adapter that changes nothing, so that the first loss can be compared."""
    for module in model.modules():
        if hasattr(module, "active"):
            module.b.data.zero_()


if __name__ == "__main__":
    main()
