"""What the pages take for granted: images, weights and runs. Small, and made only when a page asks for it."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recorded
from commands import ROOT, Result, assert_works
from PIL import Image
from stand_ins import shrunk

from speedit_jax.testing import vae_weights

CAPTIONS = ["a red bird", "a bird on a tree", "a tree", "a house at night"]
WORDS = ["<pad>", "<unk>", "</s>", "a", "cat", "red", "bird", "on", "tree", "house", "at", "night"]


class Files:
    """Each attribute is a path; what is there is made when it is first asked for."""

    def __init__(self, directory: Path, run: Callable[..., Result]):
        self.directory = directory
        self._run = run

    def call(self, command: str, *arguments: object) -> None:
        assert_works(self._run(command, *shrunk(command, [str(argument) for argument in arguments])))

    def train(self, name: str, config: str, *flags: object) -> Path:
        workdir = self.directory / "runs" / name
        self.call("train", f"--config={config}", f"--workdir={workdir}", *flags)
        return workdir

    @functools.cached_property
    def images(self) -> Path:
        for i in range(32):
            path = self.directory / "images" / ("cats", "dogs")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (70, 80, 3), np.uint8)
            Image.fromarray(pixels).save(path)
        return self.directory / "images"

    @functools.cached_property
    def photos(self) -> Path:
        """Images of one folder, with captions."""
        folder = self.directory / "photos"
        folder.mkdir()
        rows = []
        for i, path in enumerate(sorted(self.images.rglob("*.png"))):
            Image.open(path).save(folder / path.name)
            rows.append(json.dumps({"file_name": path.name, "text": CAPTIONS[i % len(CAPTIONS)]}))
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        return folder

    @functools.cached_property
    def prompts(self) -> Path:
        path = self.directory / "prompts.txt"
        path.write_text("\n".join(CAPTIONS))
        return path

    @functools.cached_property
    def digit(self) -> Path:
        """A picture of the size of the digits."""
        path = self.directory / "digit.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(path)
        return path

    @functools.cached_property
    def mask(self) -> Path:
        """White on the right half."""
        path = self.directory / "mask.png"
        Image.fromarray(np.where(np.arange(8) < 4, 0, 255).astype(np.uint8) * np.ones((8, 1), np.uint8)).save(path)
        return path

    @functools.cached_property
    def vae(self) -> Path:
        return vae_weights.write_vae(self.directory / "vae", "four")

    @functools.cached_property
    def dino(self) -> Path:
        return recorded.write_dinov2(self.directory / "dino")

    @functools.cached_property
    def features(self) -> Path:
        """Of the images, as an array."""
        path = self.directory / "features.npy"
        np.save(path, np.random.default_rng(0).standard_normal((32, 2, 2, 5)))
        return path

    @functools.cached_property
    def latents(self) -> Path:
        out = self.directory / "latents"
        self.call("encode", f"--source=folder:{self.images}", "--size=32", f"--vae={self.vae}", f"--out={out}")
        return out

    @functools.cached_property
    def inception(self) -> Path:
        """The file of PyTorch, with random weights."""
        import inception_weights

        torch = pytest.importorskip("torch")
        with np.load(ROOT / "tests" / "fixtures" / "evaluation.npz") as recorded:
            names, shapes = recorded["names"], recorded["shapes"]
        tensors = {
            str(name): torch.from_numpy(inception_weights.weight(name, tuple(int(n) for n in shape if n)).copy())
            for name, shape in zip(names, shapes, strict=True)
        }
        path = self.directory / "inception.pth"
        torch.save(tensors, path)
        return path

    @functools.cached_property
    def adm_reference(self) -> Path:
        """Images and statistics in one file, as ADM's."""
        path = self.directory / "adm.npz"
        images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
        statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
        np.savez(path, arr_0=images, **statistics)
        return path

    @functools.cached_property
    def digits_run(self) -> Path:
        return self.train("digits", "digits")

    @functools.cached_property
    def images_run(self) -> Path:
        size = ("--config.data.height=32", "--config.data.width=32")
        return self.train("mine", "base:DiT-S/2", f"--config.data.source=folder:{self.images}", *size)

    @functools.cached_property
    def samples(self) -> Path:
        out = self.directory / "new"
        self.call("sample", f"--workdir={self.images_run}", "--num_images=16", f"--out={out}")
        return out.with_suffix(".npz")

    @functools.cached_property
    def photos_run(self) -> Path:
        texts = self.directory / "photos_text"
        self.call("encode_text", f"--data=folder:{self.photos}", "--encoder=words", f"--out={texts}")
        return self.train("photos", "base", f"--config.data.source=folder:{self.photos}", f"--config.data.text={texts}")

    @functools.cached_property
    def dit_weights(self) -> Path:
        """Weights in the published format: 1000 classes, latents of four channels."""
        data = ["--config.data.channels=4", "--config.data.synthetic_classes=1000"]
        size = ["--config.data.height=16", "--config.data.width=16"]
        path = self.directory / "dit.pt"
        self.call("convert", f"--workdir={self.train('dit', 'base:DiT-XL/2', *data, *size)}", f"--to={path}")
        return path

    @functools.cached_property
    def dit_run(self) -> Path:
        workdir = self.directory / "runs" / "dit_xl"
        self.call("convert", f"--from={self.dit_weights}", f"--workdir={workdir}", f"--config.data.vae={self.vae}")
        return workdir

    @functools.cached_property
    def dit_pipeline(self) -> Path:
        """A directory of diffusers."""
        path = self.directory / "pipeline"
        self.call("convert", f"--workdir={self.dit_run}", f"--to={path}/")
        return path

    @functools.cached_property
    def clip(self) -> Path:
        from recorded import write_clip

        return write_clip(self.directory / "clip")

    @functools.cached_property
    def t5(self) -> Path:
        transformers = pytest.importorskip("transformers")
        tokenizers = pytest.importorskip("tokenizers")
        directory = self.directory / "t5"
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
        config = transformers.T5Config(vocab_size=len(WORDS), pad_token_id=0, **sizes)
        transformers.T5EncoderModel(config).eval().save_pretrained(directory)
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
        words = tokenizers.Tokenizer(model)
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "model_max_length": 120}
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
        return directory

    @functools.cached_property
    def pixart_run(self) -> Path:
        """A network of PixArt's, on captions of the T5."""
        texts = self.directory / "t5_text"
        self.call("encode_text", f"--data=folder:{self.photos}", f"--encoder=hf:{self.t5}", f"--out={texts}")
        data = [f"--config.data.source=folder:{self.photos}", f"--config.data.vae={self.vae}", f"--config.data.text={texts}"]
        return self.train("pixart", "imagenet:DiT-XL/2", *data, "--config.model.adaln=single", "--config.data.flip=False")

    @functools.cached_property
    def pixart_weights(self) -> Path:
        path = self.directory / "pixart.pt"
        self.call("convert", f"--workdir={self.pixart_run}", f"--to={path}")
        return path

    @functools.cached_property
    def pixart_diffusers(self) -> Path:
        path = self.directory / "pixart"
        self.call("convert", f"--workdir={self.pixart_run}", f"--to={path}/")
        return path

    @functools.cached_property
    def emoji(self) -> Path:
        from emoji_package import write_package

        return write_package(self.directory / "emoji.tgz")

    @functools.cached_property
    def tfds(self) -> Path:
        """What TFDS_DATA_DIR names."""
        import tfds_sets

        directory = self.directory / "tfds"
        for name in ("OxfordFlowers102", "Imagenet2012"):
            builder = type(name, (tfds_sets.Animals,), {"BUILDER_CONFIGS": []})
            builder(data_dir=directory, file_format="array_record").download_and_prepare(file_format="array_record")
        return directory
