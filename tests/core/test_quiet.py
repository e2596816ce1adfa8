"""What libraries print: bars of downloads, and nothing of a library that is not used."""

import sys

import forks
import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from nft_core.quiet import silence_libraries


@pytest.mark.parametrize("before", [enable_progress_bars, disable_progress_bars])
def test_bars_of_downloads_are_left_as_they_were(before):
    before()
    disabled = are_progress_bars_disabled()
    silence_libraries("diffusers", "transformers")
    assert are_progress_bars_disabled() == disabled
    enable_progress_bars()


def test_bitsandbytes_is_imported_by_who_uses_it():
    """peft and diffusers would import it wherever it is installed, and it prints about the machine."""
    pytest.importorskip("bitsandbytes")
    code = (
        "import sys\n"
        "from torch.nn import Linear, Sequential\n"
        "from nft_core.training.lora import LoraLayer, add_lora\n"
        "from diffusers import DiffusionPipeline, SD3Transformer2DModel\n"
        "from diffusers.quantizers.bitsandbytes import utils\n"
        "from diffusers.utils import is_bitsandbytes_available\n"
        "assert is_bitsandbytes_available()\n"
        "add_lora(Sequential(Linear(8, 8)), 2, 4, ['0'])\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "linear = utils.bnb.nn.Linear8bitLt\n"
        "import bitsandbytes\n"
        "assert bitsandbytes.nn.Linear8bitLt is linear\n"
        "from peft import LoraConfig, inject_adapter_in_model\n"
        "model = Sequential(linear(8, 8))\n"
        "model.is_loaded_in_8bit = True\n"
        "inject_adapter_in_model(LoraConfig(target_modules=['0']), model)\n"
        "assert type(model[0]).__module__ == 'peft.tuners.lora.bnb', type(model[0])\n"
    )
    done = forks.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
