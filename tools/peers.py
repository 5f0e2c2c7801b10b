"""Training and generation speed beside two public packages, in turns on one machine.

    python -m venv peers && peers/bin/pip install torch==2.13.0 \
        memformer recurrent-memory-transformer-pytorch packaging
    taskset -c 1 python tools/peers.py --python peers/bin/python

One of the packages has the name of ours, so each side lives in a process of its own. All wait
while one works; rounds go A B C A B C, and medians of processor time are compared. Each package
trains and generates as its README or its source says. Common to all are AdamW, a loss on every
token, tokens drawn from the scores, and the number of parameters: the width of our feed-forward
nets is chosen so that it agrees with that of the peer. Writes data/runs/bench-peers.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

SETTINGS = {
    "small": {
        "dim": 256, "heads": 8, "depth": 4, "slots": 32, "length": 256, "batch": 4,
        "segments": 4, "vocabulary": 256, "tokens": 128,
    },
    "readme": {  # the sizes in the README of recurrent-memory-transformer-pytorch
        "dim": 512, "heads": 8, "depth": 6, "slots": 128, "length": 1024, "batch": 1,
        "segments": 3, "vocabulary": 256, "tokens": 64,
        "without": ["rmt-no-flash"],  # the README says flash; the small setting has both
    },
}  # fmt: skip
# Who is compared with whom: the peer's variants, all in turns with our two forms of the step.
FAMILIES = {
    "decoder-only": ["ours-lm", "rmt", "rmt-no-flash", "rmt-lean"],
    "encoder-decoder": ["ours-memformer", "memformer"],
}
WORK = {
    "decoder-only": ["train", "replay", "generate"],
    "encoder-decoder": ["train", "generate"],
}


def of_size(kind, s, **layers):
    """One of our models with as many parameters as the peer has, by its feed-forward width."""
    from memformer.model import MemformerConfig

    def build(width):
        return kind(
            MemformerConfig(
                s["vocabulary"], dim=s["dim"], num_heads=s["heads"], num_slots=s["slots"],
                segment_length=s["length"], ffn_dim=width, **layers,
            )
        )  # fmt: skip

    if "parameters" not in s:
        return build(4 * s["dim"])
    one, two = (sum(p.numel() for p in build(width).parameters()) for width in (1, 2))
    return build(max(1, 1 + round((s["parameters"] - one) / (two - one))))


class OurLM:
    """`MemformerLM` with a loss on every segment, and its cached generator."""

    def __init__(self, s):
        import torch

        from memformer.model import MemformerLM

        self.torch, self.s = torch, s
        self.model = of_size(MemformerLM, s, decoder_layers=s["depth"])

    def segments(self, document):
        pieces = document[:, :-1].split(self.s["length"], 1)
        return list(zip(pieces, document[:, 1:].split(self.s["length"], 1), strict=True))

    def step(self, segment, state):
        scores, state = self.model(segment[0], state)
        loss = self.torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), segment[1].flatten()
        )
        return loss / self.s["segments"], state

    def train(self, document):
        state, total = self.model.initial_state(len(document)), 0.0
        for segment in self.segments(document):
            loss, state = self.step(segment, state)
            total = total + loss
        total.backward()

    def replay(self, document):
        from memformer.mrbp import memory_replay_backward

        memory_replay_backward(
            self.step,
            self.segments(document),
            self.model.initial_state(len(document)),
            advance=lambda segment, state: self.model.advance(segment[0], state),
        )

    def generate(self, prompt, tokens):
        from memformer.streaming import generate

        return generate(self.model, prompt, tokens)


class OurMemformer(OurLM):
    """The encoder–decoder, `depth` layers in each half."""

    def __init__(self, s):
        import torch

        from memformer.model import Memformer

        self.torch, self.s, half = torch, s, s["depth"] // 2
        self.model = of_size(Memformer, s, encoder_layers=half, decoder_layers=half)


class PeerMemformer:
    """`memformer`: the model call returns the loss; memories are passed from call to call."""

    def __init__(self, s):
        import torch

        from memformer import Memformer

        self.torch, self.s = torch, s
        half = {"num_tokens": s["vocabulary"], "depth": s["depth"] // 2, "heads": s["heads"]}
        half["max_seq_len"] = s["length"]
        halves = {f"{side}_{k}": v for side in ("enc", "dec") for k, v in half.items()}
        self.model = Memformer(
            dim=s["dim"],
            num_memory_slots=s["slots"],
            mem_update_attn_heads=s["heads"],
            **halves,
        )

    def train(self, document):
        length, memories, total = self.s["length"], None, 0.0
        for t in range(self.s["segments"]):  # reads segment t − 1 and predicts segment t
            source = document[:, (t - 1) * length : t * length] if t else document[:, :1]
            target = document[:, t * length : (t + 1) * length + 1]
            _, memories, loss = self.model(source, target, mems=memories)
            total = total + loss / self.s["segments"]
        total.backward()

    def generate(self, prompt, tokens):
        encoded = self.model(prompt[:, :1]).enc_out
        return self.model.decoder.generate(prompt, tokens, context=encoded)

    def by_hand(self, prompt, tokens):
        """What its `generate` does, without the argument that its decoder does not take."""
        torch, out = self.torch, prompt
        with torch.no_grad():
            encoded = self.model(prompt[:, :1]).enc_out
            for _ in range(tokens):
                recent = out[:, -self.s["length"] :]
                scores = self.model.decoder.net(recent, context=encoded)[:, -1]
                drawn = torch.multinomial(scores.softmax(dim=-1), 1)
                out = torch.cat((out, drawn), dim=1)
        return out[:, prompt.shape[1] :]


class PeerRMT:
    """`recurrent-memory-transformer-pytorch`: its wrapper cuts, trains, replays, generates."""

    flash, others = True, ()

    def __init__(self, s):
        import torch
        from recurrent_memory_transformer_pytorch import (
            RecurrentMemoryTransformer,
            RecurrentMemoryTransformerWrapper,
        )

        self.torch, self.s = torch, s
        transformer = RecurrentMemoryTransformer(
            num_tokens=s["vocabulary"], num_memory_tokens=s["slots"], dim=s["dim"],
            depth=s["depth"], dim_head=s["dim"] // s["heads"], heads=s["heads"],
            seq_len=s["length"], causal=True, use_flash_attn=self.flash, **dict(self.others),
        )  # fmt: skip
        self.model = RecurrentMemoryTransformerWrapper(transformer)

    def train(self, document):
        self.model(document, return_loss=True)[0].backward()

    def replay(self, document):
        self.model(document, memory_replay_backprop=True)

    def generate(self, prompt, tokens):
        return self.model.generate(prompt, length=prompt.shape[1] + tokens)


class PeerRMTNoFlash(PeerRMT):
    """Its own attention instead of the fused kernel."""

    flash = False


class PeerRMTLean(PeerRMT):
    """As near to our model as its options go: one residual stream, no keys of the past."""

    others = (("num_residual_streams", 1), ("use_xl_memories", False))


SIDES = {
    "ours-lm": OurLM,
    "ours-memformer": OurMemformer,
    "memformer": PeerMemformer,
    "rmt": PeerRMT,
    "rmt-no-flash": PeerRMTNoFlash,
    "rmt-lean": PeerRMTLean,
}


def work(name, settings):
    """Child: build one side, then measure what is asked for, line by line."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    side = SIDES[name](settings)
    optimiser = torch.optim.AdamW(side.model.parameters(), 1e-4)
    n = settings["segments"] * settings["length"]
    document = torch.randint(settings["vocabulary"], (settings["batch"], n + 1))
    begin = settings["length"] // 2 - settings["tokens"] // 2
    prompt = torch.randint(settings["vocabulary"], (1, begin))  # to halfway through, on average

    def once(job):
        if job in ("generate", "by_hand"):
            drawn = getattr(side, job)(prompt, settings["tokens"])
            assert drawn.shape == (1, settings["tokens"])
            return
        optimiser.zero_grad()
        getattr(side, job)(document)
        optimiser.step()

    parameters = sum(p.numel() for p in side.model.parameters())
    print(json.dumps({"parameters": parameters, "torch": torch.__version__}), flush=True)
    for job in sys.stdin:
        start = time.process_time()  # one thread; does not run while another process does
        try:
            once(job.strip())
            answer = {"seconds": time.process_time() - start}
        except Exception as error:  # what a package raises is a finding, not a fault of ours
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), flush=True)


class Child:
    """One side in its own process."""

    def __init__(self, python, name, settings):
        command = [python, __file__, "--side", name, "--settings", json.dumps(settings)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        first = self.process.stdout.readline()
        if not first:
            sys.exit(f"{name} does not start; try: {' '.join(command[:4])} --settings …")
        self.about = json.loads(first)

    def ask(self, job):
        self.process.stdin.write(job + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(family, settings, python, rounds):
    """All sides of a family, in turns: medians of tokens per second, and what was raised."""
    names = [name for name in FAMILIES[family] if name not in settings.get("without", ())]
    ours, *peers = names
    children = {name: Child(python, name, settings) for name in peers}
    # The variants of a peer differ by half a percent; ours is as large as the first.
    size = {"parameters": children[peers[0]].about["parameters"]}
    children[ours] = Child(sys.executable, ours, settings | size)
    results = {name: {"parameters": children[name].about["parameters"]} for name in names}
    trained = settings["batch"] * settings["segments"] * settings["length"]
    for job in WORK[family]:
        tokens = settings["tokens"] if job == "generate" else trained
        asked, seconds = dict.fromkeys(names, job), {name: [] for name in names}
        warm = int(job == "train")  # its first round warms up
        for i in range(warm + rounds):
            for name in names:
                answer = children[name].ask(asked[name])
                if "error" in answer:
                    results[name][f"{asked[name]}_error"] = answer["error"]
                    asked[name] = "by_hand" if hasattr(SIDES[name], "by_hand") else job
                    answer = children[name].ask(asked[name])
                if i >= warm and "seconds" in answer:
                    seconds[name].append(answer["seconds"])
        for name in names:
            if seconds[name]:
                key = f"{asked[name]}_tokens_per_second"
                results[name][key] = round(tokens / statistics.median(seconds[name]), 2)
        print(family, job, {n: [round(t, 2) for t in seconds[n]] for n in names}, flush=True)
    for child in children.values():
        child.close()
    return results


def ratios(results):
    """Ours over the fastest variant of the peer, and over its README's."""
    ours, *peers = results.values()
    out = {}
    for job in ("train", "replay", "generate"):
        key = f"{job}_tokens_per_second"
        hand = "by_hand_tokens_per_second"
        speeds = [p.get(key, p.get(hand) if job == "generate" else None) for p in peers]
        known = [speed for speed in speeds if speed]
        if key in ours and known:
            out[job] = {"over_fastest": round(ours[key] / max(known), 2)}
            if speeds[0]:
                out[job]["over_readme"] = round(ours[key] / speeds[0], 2)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="the interpreter that has the two packages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--family", choices=FAMILIES, help="one family; nothing is written")
    parser.add_argument("--only", choices=SETTINGS, help="one setting; nothing is written")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        work(given.side, json.loads(given.settings))
        return
    if not given.python:
        parser.error("--python is needed: the packages live in an environment of their own")
    import torch

    from memformer.files import data_folder
    from memformer.lab.records import describe_machine, save_record

    torch.set_num_threads(1)
    listing = subprocess.run(
        [given.python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = "memformer", "recurrent-memory-transformer-pytorch", "torch", "einops"
    versions = {v.split("==")[0]: v.split("==")[-1] for v in listing if "==" in v}
    start, comparisons = time.perf_counter(), []
    for name, settings in SETTINGS.items():
        if given.only in (None, name):
            for family in [given.family] if given.family else FAMILIES:
                results = compare(family, settings, given.python, given.rounds)
                comparisons.append(
                    {"setting": name, "sizes": settings, "family": family,
                     "sides": results, "ratios": ratios(results)}
                )  # fmt: skip
                print(name, family, json.dumps(comparisons[-1]["ratios"]), flush=True)
    record = {
        "what": "Training and generation speed beside two public packages, in turns",
        "recipe": {"rounds": given.rounds, "clock": "processor time of one thread"},
        "seed": 0,
        "machine": describe_machine(),
        "peers": {name: versions.get(name) for name in wanted},
        "seconds": round(time.perf_counter() - start, 1),
        "results": comparisons,
    }
    if given.only is None and given.family is None:
        save_record(data_folder(), "bench-peers", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
