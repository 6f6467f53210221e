"""Imports weights as a directory to sample from, and exports a run's weights.

  python -m speedit_jax.convert --from=DiT-XL-2-256x256.pt --workdir=runs/dit_xl [--config.KEY=VALUE ...]
  python -m speedit_jax.convert --workdir=runs/mine --to=mine.safetensors [--weights=raw] [--checkpoint_step=N]
  python -m speedit_jax.convert --from=hf:facebook/DiT-XL-2-256 --workdir=runs/dit_xl
  python -m speedit_jax.convert --workdir=runs/mine --to=hf:OWNER/NAME --license=apache-2.0

A file (.safetensors, or what torch.save writes) holds the names of the published PyTorch code of DiT (which fast-DiT, SpeeD, SiT
and REPA share) or DiG; a directory is a diffusers DiTTransformer2DModel or DiTPipeline. On the Hugging Face hub (hf:, which
needs pip install -e '.[hub]') a repository holds one of these, or a run that --to=hf: uploaded. docs/weights.md says what is
exact.
"""

import sys
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from speedit_jax import cli, storage
from speedit_jax.conversion.exporting import export_weights
from speedit_jax.conversion.importing import import_weights
from speedit_jax.conversion.publishing import publish_weights
from speedit_jax.errors import UserError
from speedit_jax.interop import model_hub

_FROM = flags.DEFINE_string(
    "from", None, "Import: FILE.pt, FILE.safetensors, a diffusers directory, or hf:OWNER/NAME[@REVISION][/FILE]."
)
_REVERSE_TIME = flags.DEFINE_bool(
    "reverse_time",
    None,
    "Import of a flow: its time is 1 at noise, as in REPA and LFM, not 0 as in SiT. Default: what the file says.",
)
_TO = flags.DEFINE_string(
    "to", None, "Export: OUT.pt, OUT.safetensors, OUT/ for a diffusers directory, or hf:OWNER/NAME with a model card."
)
_LICENSE = flags.DEFINE_string(
    "license", None, "Export to hf: the licence of the weights as the hub spells it, as apache-2.0, cc-by-nc-4.0 or other."
)
_PUBLIC = flags.DEFINE_bool(
    "public", False, "Export to hf: a new repository is public. Default: private; an old one stays as it is."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Import: a new directory. Export: the directory of a run.")
_WEIGHTS = flags.DEFINE_string("weights", "ema", "Export: ema, raw, or ema_DECAY for one of training.extra_ema_decays.")
_CHECKPOINT_STEP = flags.DEFINE_string("checkpoint_step", "newest", "Export: newest, best, or a number.")
_VAE = flags.DEFINE_string("vae", None, "Export to diffusers: where the autoencoder is. Default: where it was in training.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Import: --config.KEY=VALUE replaces what the file says or leaves open.", lock_config=True
)


def convert() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; it is the directory that --from creates or --to exports")
    if bool(_FROM.value) == bool(_TO.value):
        raise UserError("give one of --from=FILE (import) and --to=FILE (export)")
    workdir = storage.path(_WORKDIR.value)
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError("--config: cannot be read, or its get_config() does not return a ConfigDict")
    given = config_flags.get_override_values(flags.FLAGS["config"])
    if _FROM.value:
        if _VAE.value:
            raise UserError("--vae is only for --to; for an import, use --config.data.vae=DIR")
        if _LICENSE.value or _PUBLIC.value:
            raise UserError("--license and --public are only for --to=hf:OWNER/NAME")
        for flag in (_WEIGHTS, _CHECKPOINT_STEP):
            if flag.value != flag.default:
                raise UserError(f"--{flag.name}={flag.value} is only for --to; an import takes all weights of a file")
        import_weights(_FROM.value, workdir, _CONFIG.value, given, _REVERSE_TIME.value)
        return
    if _REVERSE_TIME.value is not None:
        raise UserError("--reverse_time is only for --from")
    if given:
        raise UserError(f"--config.{next(iter(given))} is only for --from: a run already has its config")
    if _TO.value.startswith(model_hub.SCHEME):
        if _VAE.value:
            raise UserError("--vae is only for diffusers directories: on the hub, a model card names the autoencoder")
        publish_weights(workdir, _TO.value, _WEIGHTS.value, _CHECKPOINT_STEP.value, _LICENSE.value, _PUBLIC.value)
        return
    if _LICENSE.value or _PUBLIC.value:
        raise UserError("--license and --public are only for --to=hf:OWNER/NAME")
    if _VAE.value and storage.path(_TO.value).suffix in (".pt", ".safetensors"):
        raise UserError("--vae is only for diffusers directories: a file of weights holds no autoencoder")
    export_weights(workdir, _TO.value, _WEIGHTS.value, _CHECKPOINT_STEP.value, _VAE.value)


if __name__ == "__main__":
    if not any(argument.startswith("--config=") for argument in sys.argv):
        # As the flag's default it would be read before a mistake in --config.KEY can be told in one line.
        sys.argv.insert(1, f"--config={Path(__file__).with_name('config.py')}")
    cli.run(convert)
