"""Writes a CLIP model with random weights to a folder, in the form that the environment of oldscore reads."""

import json
import string
import sys
from pathlib import Path

from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

folder = Path(sys.argv[1])
folder.mkdir()
letters = string.ascii_lowercase + string.digits + string.punctuation
words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
(folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", model_max_length=24).save_pretrained(folder)
CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = CLIPConfig(
    text_config={**small, "vocab_size": len(words), "max_position_embeddings": 24},
    vision_config={**small, "image_size": 32, "patch_size": 8},
    projection_dim=16,
)
CLIPModel(config).save_pretrained(folder, safe_serialization=True)
