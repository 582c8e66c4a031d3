"""The same on a real chat model: the sampler, updates beside TRL's, and how they grow.

    python -m studies.speed.real BASE ours|theirs PAIRS SAMPLES PROMPT NEW LORA
                                        two updates alone; the last line is the memory they took

Prompts are random tokens behind a beginning that all share, as a system message is. So responses
are nonsense, hardly any ends, and all updates have the same size.
"""
import json
import subprocess
import sys
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from model import load_checkpoint
from opct import ConsistencyConfig, student_and_teacher
from studies.speed import training
from studies.speed.sampler import (best, comparison_row, machine_rates, peak_bytes, transformers)
from support.common import guarded, pick_device, rng

BASE = Path("out/real/SmolLM2-135M-Instruct")
SHARED = 24                 # tokens that all prompts of this model begin with


@dataclass
class Case:
    """An update: pairs, responses to each, tokens of a prompt and of a response, rank of LoRA."""
    pairs: int
    samples: int
    prompt: int
    new: int
    lora: int = 0


def prompts_of(vocabulary, distinct, samples, length):
    """Random prompts of one length, each as often as it gets responses."""
    draws = rng("speed", distinct, length)
    shared = min(SHARED, length // 2)
    begin = [draws.randrange(1, vocabulary) for _ in range(shared)]
    prompts = [begin + [draws.randrange(1, vocabulary) for _ in range(length - shared)]
               for _ in range(distinct)]
    return [prompt for prompt in prompts for _ in range(samples)]


def settings(base, case):
    return ConsistencyConfig(base=str(base), lora=case.lora, max_new_tokens=case.new)


def case_prompts(base, case):
    vocabulary = json.loads((Path(base) / "config.json").read_text())["vocab_size"]
    return prompts_of(vocabulary, case.pairs, case.samples, case.prompt)


# --- The sampler -----------------------------------------------------------------------------

def sampler_rows(base, preset, device):
    """Beside transformers, in alternation, on prompts of one length; and the machine's rates."""
    model, theirs, rows, rates = load_checkpoint(base, device), None, [], machine_rates(device)
    model.config.eos_token_id = -1                          # every row writes all tokens
    if transformers is not None:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        theirs = theirs.to(device).eval()
    for batch in preset.real_batches:
        print(f"a real model, sampler: batch {batch}", flush=True)
        prompts = prompts_of(model.config.vocab_size, batch, 1, preset.real_cases[0].prompt)
        rows.append(comparison_row(model, theirs, prompts, preset.new, preset.real_rounds, rates,
                                   False))
    return {"rates": rates, "sampler": rows}


# --- Updates ---------------------------------------------------------------------------------

def alone(base, case, who):
    """Memory of two updates in a process of its own: of the libraries and at the peak, in bytes; on
    a GPU what its tensors take. None where it does not run."""
    command = [sys.executable, "-m", "studies.speed.real", base, who, *astuple(case)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def least_bytes(base, case, device):
    """What has to be there: weights, gradients and AdamW's two means in float32, the teacher."""
    student, teacher = student_and_teacher(settings(base, case), device)
    every = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = 0 if teacher is student else every
    return 4 * (every + 3 * trained + frozen)


def update_row(base, case, preset, device):
    """Time beside TRL's in alternation, memory of each alone, and the parts of ours."""
    print(f"a real model, an update: {case}", flush=True)
    prompts, config = case_prompts(base, case), settings(base, case)
    row = {"case": asdict(case), "least_bytes": least_bytes(base, case, device),
           "peak_bytes": {who: alone(base, case, who) for who in ("ours", "theirs")},
           "trl": training.compare_with_trl(config, prompts, preset.real_rounds, device)}
    if not case.lora:
        student, teacher = student_and_teacher(config, device)
        row["parts"] = training.time_update("opct-exact", student, teacher, prompts, prompts,
                                            case.new, preset.real_rounds)["seconds"]
    return row


def growth_row(base, case, preset, device):
    """Seconds of an update of ours, the better of two."""
    print(f"a real model, growth: {case}", flush=True)
    update = training.our_update(settings(base, case), case_prompts(base, case), device)
    return {"case": asdict(case), "seconds": best(update, device, 2)}


def measure(preset, device, keep, base=BASE):
    """Everything on the real model, as numbers, or what is missing.

    keep(name, function): what the function returns, or what it returned before a stop.
    """
    if not Path(base).is_dir():
        return {"missing": f"there is no {base}, which `bash train.sh study real` makes"}
    found = keep("sampler", lambda: sampler_rows(base, preset, device))
    for kind, cases, row in (("updates", preset.real_cases, update_row),
                             ("growth", preset.real_growth, growth_row)):
        found[kind] = [keep(f"{kind}-{i}", lambda: row(base, case, preset, device))
                       for i, case in enumerate(cases)]
    return found


def main():
    base, who, *sizes = sys.argv[1:]
    case, device = Case(*map(int, sizes)), pick_device()
    prompts, before = case_prompts(base, case), peak_bytes(device)
    if who == "ours":
        update = training.our_update(settings(base, case), prompts, device)
        update()
        update()
    else:
        training.train_theirs(settings(base, case), prompts, 2, device)
    print(json.dumps({"libraries": before, "peak": peak_bytes(device)}))


if __name__ == "__main__":
    guarded(main)
