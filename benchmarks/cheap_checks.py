"""How much work does a mistake of the user's cost before it is told? CPU seconds of each, and what is said.

python benchmarks/cheap_checks.py [WORD] [--beside FOLDER]

Runs `nft` once with each mistake whose name holds WORD, and prints its seconds, its exit code and its last
line. CPU seconds are those of the process and of all that it started; a busy machine hardly changes them.
FOLDER is a checkout of another version, which is measured beside this one. No hub can be reached meanwhile.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

#: Seconds after which a command is ended: its mistake was not found.
LONGEST = 300
#: An address at which no hub answers.
NO_HUB = "http://127.0.0.1:9"
RUN = "run --tiny --out new --reward"
#: Mistakes by name: the words of a command, in a folder that `write_files` has filled.
MISTAKES = {
    "unknown option of run": "run --tiny --reward jpeg_compressibility --epoch 3",
    "no reward": "run --tiny --out new",
    "misspelt reward": f"{RUN} pickscroe",
    "misspelt reward option": f"{RUN} pickscore,varaint=nft",
    "reward option of another type": f"{RUN} ocr,upscale=large",
    "misspelt option among defaults": f"{RUN} jpeg_compressibility "
    "--set reward_defaults={jpeg_compressibility={x=1}}",
    "missing extra": f"{RUN} hpsv2",
    "missing extra of an engine": f"{RUN} ocr,engine=paddle",
    "missing environment": f"{RUN} imagereward,engine=package",
    "reward of a module that is not there": f"{RUN} absent.rewards:warmth",
    "reward that its module has not": f"{RUN} nft_rewards.ocr:Absent",
    "reward that a heavy library has not": f"{RUN} diffusers:Absent",
    "reward file that is not there": f"{RUN} absent.py:warmth",
    "reward file without that function": f"{RUN} mine.py:absent",
    "all weights 0": f"{RUN} ocr=0",
    "misspelt setting": f"{RUN} ocr --set epoks=3",
    "setting out of range": f"{RUN} ocr --set lr=-1",
    "contradictory settings": f"{RUN} ocr --set updates_per_epoch=7",
    "two presets": "run --tiny --preset large --reward ocr",
    "option of another command": f"{RUN} ocr --card 24",
    "resume of a run without its folder": "run --tiny --reward ocr --resume auto",
    "unknown preset": "run --preset tinny --reward ocr",
    "misspelt solver": f"{RUN} ocr --solver eular",
    "misspelt solver option": f"{RUN} ocr --solver euler --set solver_options={{eta=1}}",
    "misspelt solver of diffusers": f"{RUN} ocr --solver diffusers:Absent",
    "misspelt observer": f"{RUN} ocr --observer tensorbord",
    "misspelt option of an observer": f"{RUN} ocr --observer wandb,projekt=x",
    "observer file that is not there": f"{RUN} ocr --observer absent.py:Watch",
    "unknown device": f"{RUN} ocr --device gpu",
    "no GPU": f"{RUN} ocr --device cuda",
    "prompts file that is not there": f"{RUN} ocr --prompts absent.txt",
    "prompts file of another kind": f"{RUN} ocr --prompts table.csv",
    "too few prompts": f"{RUN} jpeg_compressibility --prompts few.txt",
    "too few prompts that the reward suits": f"{RUN} ocr --prompts mixed.txt",
    "prompts that no reward suits": f"{RUN} ocr --prompts plain.txt",
    "prompts that geneval does not suit": f"{RUN} geneval --prompts plain.txt",
    "model that is not there": f"{RUN} ocr --model ./absent",
    "model that is no model": f"{RUN} ocr --model notes",
    "model whose pipeline is unknown": f"{RUN} ocr --model unknown",
    "LoRA that is not there": f"{RUN} ocr --lora absent.safetensors",
    "model that was not fetched": "run --reward jpeg_compressibility --out new --set processes=1",
    "reward that was not fetched": f"{RUN} imagereward",
    "guidance of a model without": f"{RUN} ocr --set eval_guidance=-1",
    "resolution that is impossible": f"{RUN} ocr --set resolution=33",
    "folder in use": "run --tiny --reward ocr --out notes",
    "run file that is not there": "run --config absent.toml",
    "plan of a model that was not fetched": "run --reward jpeg_compressibility --plan",
    "resume of no folder": "resume absent",
    "resume of another folder": "resume notes",
    "resume with changed settings": "resume run --set lr=1",
    "resume with changed prompts": "resume run --set prompts=many.txt",
    "resume with another reward": "resume run --reward ocr",
    "resume by run with another seed": "run --tiny --reward jpeg_compressibility --out run "
    "--resume auto --seed 3",
    "eval without rewards": "eval --tiny tiny",
    "eval with misspelt reward": "eval --tiny tiny --reward pickscroe",
    "eval with misspelt reward option": "eval --tiny tiny --reward pickscore,varaint=nft",
    "eval of no model": "eval --tiny ./absent --reward ocr",
    "eval with no prompts": "eval --tiny tiny --reward ocr --prompts absent.txt",
    "eval with unsuited prompts": "eval --tiny tiny --reward ocr --prompts plain.txt --set unscorable=error",
    "eval into a file": "eval --tiny tiny --reward ocr --out red.png",
    "eval of a model that was not fetched": "eval stabilityai/stable-diffusion-3.5-medium --reward ocr",
    "sample without prompts": "sample --tiny",
    "sample of no model": "sample --model ./absent --prompt cat",
    "sample with misspelt solver": "sample --tiny --prompt cat --solver eular",
    "sample of a model that was not fetched": "sample --model stabilityai/stable-diffusion-3.5-medium "
    "--prompt cat",
    "score of no image": "score absent.png --reward ocr",
    "score with misspelt reward": "score red.png --reward pickscroe",
    "score with misspelt reward option": "score red.png --reward jpeg_compressibility,varaint=ddpo",
    "score without a prompt": "score red.png --tiny --reward pickscore",
    "score with an unsuited prompt": "score red.png --tiny --reward ocr --prompt cat",
    "score with a reward that was not fetched": "score red.png --reward pickscore --prompt cat",
    "compare of no run": "compare absent notes",
    "serve of a misspelt reward": "serve --reward pickscroe",
    "info of a misspelt reward": "rewards info pickscroe",
    "check of a misspelt reward option": "rewards check jpeg_compressibility varaint=ddpo",
}


class Cost(NamedTuple):
    """Holds what a command took and said. cpu, wall: seconds. first: until the first line."""

    cpu: float
    wall: float
    code: int
    said: str


def write_files(folder: Path) -> None:
    """Write the files that the mistakes speak of."""
    from PIL import Image

    words = [f'a sign that says "WORD{chr(65 + n)}"' for n in range(26)]
    plain = [f"a red circle of size {n}" for n in range(40)]
    for name, lines in (("few", plain[:5]), ("plain", plain), ("many", words), ("mixed", plain + words[:8])):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    (folder / "table.csv").write_text("prompt\ncat\n")
    (folder / "mine.py").write_text("def warmth(images):\n    return images[:, 0].mean((1, 2))\n")
    for name in ("notes", "unknown"):
        (folder / name).mkdir()
    (folder / "notes" / "note.txt").write_text("mine")
    (folder / "unknown" / "model_index.json").write_text('{"_class_name": "AbsentPipeline"}')
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")


def run_nft(words: str, folder: Path, other: Path | None = None, longest: float = LONGEST) -> Cost:
    """Run `nft` with these words in a folder, and measure it with all processes that it starts.

    other: a checkout of another version, which is run in place of this one.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "nft_core", *words.split()]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": NO_HUB, "HF_HOME": str(folder / "hub")}
    if other:
        rooms = (other / "core", other / "rewards", other / "solvers", other)
        environment["PYTHONPATH"] = os.pathsep.join(map(str, rooms))
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=longest
        )
        code, lines = done.returncode, (done.stderr.strip() or done.stdout.strip()).splitlines()
    except subprocess.TimeoutExpired:
        code, lines = -1, [f"not found in {longest:.0f} s"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, time.perf_counter() - start, code, lines[-1] if lines else "")


def make_run(folder: Path) -> Cost:
    """Make the small run that is resumed, of one epoch."""
    sizes = "prompts_per_epoch=2 group_size=2 steps=1 eval_steps=1 eval_images=1 processes=1 checkpoint_every=1"
    settings = " ".join(f"--set {size}" for size in sizes.split())
    return run_nft(
        f"run --tiny --reward jpeg_compressibility --out run --epochs 1 --device cpu {settings}", folder
    )


def main() -> None:
    """Measure the mistakes that the command line chooses, and print a table of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--beside", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    chosen = {name: words for name, words in MISTAKES.items() if options.word in name}
    versions = [options.beside.resolve(), None] if options.beside else [None]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder)
        if any("resume" in name for name in chosen):
            make_run(folder)
        columns = ["mistake", *(["CPU s before"] if options.beside else []), "CPU s", "s", "code", "said"]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        for name, words in chosen.items():
            costs = []
            for version in versions:
                costs.append(run_nft(words, folder, version))
                shutil.rmtree(folder / "new", ignore_errors=True)
            last = costs[-1]
            said = last.said.replace(os.sep + str(folder), "").replace("|", "/")[:150]
            seconds = " | ".join(f"{cost.cpu:.1f}" for cost in costs)
            print(f"| {name} | {seconds} | {last.wall:.0f} | {last.code} | {said} |", flush=True)


if __name__ == "__main__":
    main()
