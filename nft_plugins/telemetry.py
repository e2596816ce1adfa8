"""What libraries report to their makers is switched off, where the user's environment says nothing else.

They read these variables when they are imported, so this module is imported before any of them; processes that
are started from here inherit them. docs/safety.md says what each would send.
"""

from __future__ import annotations

import os

#: Environment variables that switch reports off.
OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime, which torch's compiler and the ocr reward import
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, diffusers, transformers, accelerate, peft
    # transformers asks a service of huggingface.co's, with your token, to convert a model without safetensors.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "WANDB_ERROR_REPORTING": "false",  # wandb's reports of errors; not what the observer logs
    "PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK": "True",  # PaddleX asks each of its hosts whether it is there
    "NO_ALBUMENTATIONS_UPDATE": "1",  # albumentations, which PaddleOCR 2.9 imports, asks PyPI for a newer one
}

for name, value in OFF.items():
    os.environ.setdefault(name, value)
