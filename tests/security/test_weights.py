"""Weights of others: no pickle's code is run, and nothing is allocated for sizes that a file only claims."""

import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nft_tiny
from nft_core.errors import NftError
from nft_core.models.sd3 import SD3
from nft_core.scoring.composer import reward
from nft_rewards.aesthetic import FILE, make_head
from nft_rewards.files import find_file, load_weights, read_tensors

DATA = Path(nft_tiny.__file__).parent / "data"
LAYER = "layers.0.weight"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.fixture
def mark(tmp_path):
    """What a payload would write."""
    return tmp_path / "mark"


@pytest.fixture
def clip(tmp_path):
    return shutil.copytree(DATA / "clip", tmp_path / "clip")


@pytest.fixture
def pipeline(tmp_path):
    return shutil.copytree(DATA / "pipeline", tmp_path / "pipeline")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_pickle(weights, name):
    """Weights as torch once saved them, in the place of a safetensors file."""
    torch.save(load_file(weights), weights.with_name(name))
    weights.unlink()


def command(message):
    """The command in an error, for this interpreter."""
    line = re.search(r'python (-c ".*?" .*?)(?:$| \(\w+\.py, line)', message)[1]
    return f'"{sys.executable}" {line}'


def test_the_payload_works(tmp_path, mark):
    torch.save({"x": Payload(mark)}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert mark.exists()


def test_a_published_torch_file_is_read(tmp_path):
    torch.save({"state_dict": make_head().state_dict()}, tmp_path / FILE)
    head = make_head()
    load_weights(head, read_tensors(tmp_path / FILE), tmp_path / FILE)
    torch.testing.assert_close(head.state_dict()[LAYER], torch.load(tmp_path / FILE)["state_dict"][LAYER])


def test_a_malicious_pickle_in_the_place_of_a_published_file(tmp_path, clip, mark):
    torch.save(make_head().state_dict() | {"x": Payload(mark)}, tmp_path / FILE)
    with pytest.raises(NftError, match=r"pickle of more than tensors.*it asks for \w+\.exec"):
        reward("aesthetic", checkpoint=str(tmp_path), clip=str(clip)).load()
    assert not mark.exists()


def test_a_bare_pickle_is_refused(tmp_path, mark):
    (tmp_path / FILE).write_bytes(pickle.dumps({"x": Payload(mark)}))
    with pytest.raises(NftError, match="bare pickle.*python -c") as caught:
        reward("aesthetic", checkpoint=str(tmp_path)).load()
    done = subprocess.run(command(str(caught.value)), shell=True, capture_output=True, text=True)
    assert done.returncode != 0 and "Weights only load failed" in done.stderr
    assert not mark.exists()


def test_the_command_converts_a_file_of_an_old_torch(tmp_path):
    path = tmp_path / "with space.pth"
    torch.save(make_head().state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(OSError, match="bare pickle") as caught:
        read_tensors(path)
    subprocess.run(command(str(caught.value)), shell=True, check=True)
    assert read_tensors(path.with_suffix(".safetensors"))[LAYER].shape == (1024, 768)


def test_pickles_where_the_published_file_is_of_safetensors(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(OSError, match=r"x.bin: pickled weights can run code.*x.safetensors"):
        find_file(str(tmp_path / "x.bin"), "HPSv3.safetensors")


def test_a_pickled_clip_is_refused_and_the_command_converts_it(clip):
    as_pickle(clip / "model.safetensors", "pytorch_model.bin")
    with pytest.raises(NftError, match="pytorch_model.bin: pickled weights can run code") as caught:
        reward("clipscore", checkpoint=str(clip)).load()
    subprocess.run(command(str(caught.value)), shell=True, check=True)
    reward("clipscore", checkpoint=str(clip)).load()


@pytest.mark.parametrize(
    ("part", "weights", "name"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_pickled_part_is_refused_and_the_command_converts_it(pipeline, part, weights, name):
    before = load_file(pipeline / part / weights)
    as_pickle(pipeline / part / weights, name)
    with pytest.raises(OSError, match=f"{name}: pickled weights can run code") as caught:
        SD3(str(pipeline), max_sequence_length=0)
    subprocess.run(command(str(caught.value)), shell=True, check=True)
    SD3(str(pipeline), max_sequence_length=0)
    after = load_file(pipeline / part / weights)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_an_index_that_names_a_pickle_runs_nothing(pipeline, mark):
    weights = pipeline / "text_encoder" / "model.safetensors"
    torch.save(dict.fromkeys(names := load_file(weights), Payload(mark)), weights.with_name("x.bin"))
    weights.with_name("model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "x.bin")})
    )
    weights.unlink()
    with pytest.raises(OSError, match="x.bin: pickled weights can run code"):
        SD3(str(pipeline), max_sequence_length=0)
    assert not mark.exists()


def safetensors(header, data=b"\0" * 16, length=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TEN_TB = 10**13
CLAIMS = {
    "header": safetensors({}, length=TEN_TB),
    "tensor": safetensors({"a": {"dtype": "F32", "shape": [TEN_TB // 4], "data_offsets": [0, TEN_TB]}}),
    "shape": safetensors({"a": {"dtype": "F32", "shape": [TEN_TB // 4], "data_offsets": [0, 16]}}),
    "overflow": safetensors({"a": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 16]}}),
    "cut": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 15),
    "empty": b"",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_safetensors_file_that_claims_more_than_it_holds(tmp_path, claim):
    path = tmp_path / "head.safetensors"
    path.write_bytes(CLAIMS[claim])
    with pytest.raises(NftError, match="Cannot read weights from .*head.safetensors"):
        reward("aesthetic", checkpoint=str(path)).load()


def test_a_tensor_of_another_shape_is_refused_before_it_is_read(tmp_path):
    """A hole in the file: 8 TB that no machine could read."""
    path = tmp_path / "head.safetensors"
    size = 2**43
    head = safetensors({LAYER: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")
    with path.open("wb") as file:
        file.write(head)
        try:
            file.truncate(len(head) + size)
        except OSError:
            pytest.skip("this file system takes no file of 8 TB")
    with pytest.raises((OSError, NftError), match="Cannot read weights|does not hold the"):
        reward("aesthetic", checkpoint=str(path)).load()


def rezip(source, target, compression, change=lambda name, data: data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_a_torch_file_that_unpacks_to_more_than_itself(tmp_path):
    torch.save({"a": torch.zeros(2**22)}, tmp_path / "large.pt")
    rezip(tmp_path / "large.pt", tmp_path / FILE, zipfile.ZIP_DEFLATED)
    assert (tmp_path / FILE).stat().st_size < 100_000
    with pytest.raises(NftError, match="unpacks to more than its own size"):
        reward("aesthetic", checkpoint=str(tmp_path)).load()


class Stretched:
    """A tensor of a million million numbers over a storage of four."""

    def __reduce__(self):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return (torch._utils._rebuild_tensor_v2, (storage, 0, (10**12,), (1,), False, {}))


def test_a_torch_file_whose_tensor_is_larger_than_its_storage(tmp_path):
    torch.save({"a": Stretched()}, tmp_path / FILE)
    with pytest.raises(NftError, match=r"Cannot read weights from.*storage"):
        reward("aesthetic", checkpoint=str(tmp_path)).load()


def test_a_config_of_a_larger_clip_than_its_file(clip):
    config = json.loads((clip / "config.json").read_text())
    change(clip / "config.json", text_config=config["text_config"] | {"vocab_size": 10**11})
    with pytest.raises(NftError, match=r"the config is of a model of \S+ numbers, the files hold"):
        reward("clipscore", checkpoint=str(clip)).load()


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("text_encoder", {"vocab_size": 10**11}),
        ("text_encoder", {"max_position_embeddings": 10**11}),
        ("transformer", {"caption_projection_dim": 10**8}),
    ],
)
def test_a_config_of_a_larger_part_than_its_file(pipeline, part, values):
    change(pipeline / part / "config.json", **values)
    with pytest.raises(OSError, match=rf"{part}: the config is of a \w+ of \S+ numbers, the files hold"):
        SD3(str(pipeline), max_sequence_length=0)
