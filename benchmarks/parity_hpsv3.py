"""Our HPSv3 beside the authors' package, on one file in the published form, small and with random weights.

python benchmarks/parity_hpsv3.py write FOLDER     HPSv3.safetensors, and a small Qwen2-VL with its processor
python benchmarks/parity_hpsv3.py score FOLDER     with our loader and model
python benchmarks/parity_hpsv3.py package FOLDER   with the package, and the difference between the two

The package pins transformers 4.45.2, so the last line wants an environment of its own, with hpsv3==1.0.0 (its
training half wants deepspeed, which is not needed: pip install --no-deps, then transformers==4.45.2
trl==0.11.4 "peft<0.14" "numpy<2.3" torchvision pandas matplotlib tensorboard omegaconf fire rich), pluggy, and
this repository's root and rewards/ on PYTHONPATH. It computes in bfloat16; a second comparison runs its model
in float32.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from pairs import batches

PROMPTS = ["a red cat", "two dogs on a mat", "an ocean with clouds and birds", "x" * 20 + " a b c" * 30]
SIZES = ((512, 512), (300, 200), (448, 448), (30, 70))
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
CHAT = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m['role'] }}
{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_act": "silu",
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "sliding_window": 4096,
    "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 4, "embed_dim": 64, "mlp_ratio": 4, "num_heads": 4, "in_chans": 3, "hidden_size": 128,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
}  # fmt: skip
PROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
}  # fmt: skip


def write(folder: Path) -> None:
    """Write a small checkpoint in the published form, and the pictures that both score."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2VLConfig

    from nft_rewards.hpsv3 import RewardModel

    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(base / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    (base / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    (base / "merges.txt").write_text("#version: 0.2\n")
    added = {str(i): {"content": t, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                      "single_word": False} for t, i in ids.items()}  # fmt: skip
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
                "additional_special_tokens": list(SPECIAL[1:]), "added_tokens_decoder": added,
                "chat_template": CHAT}  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    (base / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    named = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
             "vision_start_token_id": ids["<|vision_start|>"], "bos_token_id": ids["<|endoftext|>"],
             "eos_token_id": ids["<|im_end|>"], "vocab_size": 300}  # fmt: skip
    (base / "config.json").write_text(json.dumps(CONFIG | named))

    def weights(count: int) -> dict[str, torch.Tensor]:
        """Draw weights with the published names, for a vocabulary of `count`."""
        config: Any = Qwen2VLConfig.from_pretrained(base)
        config.text_config.vocab_size = count
        torch.manual_seed(0)
        model = RewardModel(config)
        state = {"lm_head.weight": torch.zeros(count, 128)}
        for name, weight in model.state_dict().items():
            state[name] = torch.randn_like(weight) * 0.1 + ("norm" in name and name.endswith("weight"))
        return {name: weight.bfloat16() for name, weight in state.items()}

    save_file(weights(len(letters) + len(SPECIAL) + 1), folder / "HPSv3.safetensors")
    language = {k: v for k, v in weights(300).items() if not k.startswith("rm_head")}
    save_file(language, base / "model.safetensors", metadata={"format": "pt"})


def ours(folder: Path) -> None:
    """Score the pictures with our HPSv3."""
    from nft_rewards.hpsv3 import HPSv3

    result = {}
    for precision in ("fp32", "bf16"):
        reward = HPSv3(str(folder), base=str(folder / "base"), precision=precision)
        result[precision] = [
            value for batch in batches(PROMPTS, SIZES) for value in reward(batch).values.tolist()
        ]
        print(precision, *(f"{value:.4f}" for value in result[precision]))
    (folder / "ours.json").write_text(json.dumps(result))


def package(folder: Path) -> None:
    """Score the pictures with the authors' package."""
    if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
        # PyPI's torchvision beside a CPU build of torch lacks these two, which are not used here.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import hpsv3
    import yaml

    published = Path(hpsv3.__file__).parent / "config" / "HPSv3_7B.yaml"
    settings = yaml.safe_load(published.read_text())
    settings |= {"model_name_or_path": str(folder / "base"), "use_cpu": True, "report_to": "none"}
    settings["output_dir"] = str(folder / "output")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    reward = hpsv3.HPSv3RewardInferencer(str(config), str(folder / "HPSv3.safetensors"), device="cpu")
    # On CUDA the package's autocast does this; it has none for CPUs.
    reward.model.rm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    mine = {name: torch.tensor(v) for name, v in json.loads((folder / "ours.json").read_text()).items()}

    @torch.no_grad()
    def scores() -> torch.Tensor:
        return torch.cat(
            [reward.reward(batch.pil, list(batch.prompts))[:, 0].float() for batch in batches(PROMPTS, SIZES)]
        )

    theirs = {"bf16, as published": scores()}
    reward.model.float()
    reward.model.visual.rotary_pos_emb.bfloat16()  # As published: that of the text stays rounded by itself.
    theirs["fp32"] = scores()
    print(f"their scores in fp32: mean {theirs['fp32'].mean():.4f}, deviation {theirs['fp32'].std():.4f}")
    for name, values in theirs.items():
        for own, value in mine.items():
            difference = (value - values).abs().max() / values.std()
            print(f"package in {name} and ours in {own}: largest difference {difference:.1e} deviations")


if __name__ == "__main__":
    {"write": write, "score": ours, "package": package}[sys.argv[1]](Path(sys.argv[2]).resolve())
