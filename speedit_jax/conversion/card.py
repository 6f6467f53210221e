"""The model card of a repository, its README.md: what the network is, how to load it, how it was trained, what was measured.

Only what the run's directory says is written: no claim about what the model is good for.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence

import ml_collections

from speedit_jax import __version__
from speedit_jax.config import flatten, get_config
from speedit_jax.conversion.measured import Number
from speedit_jax.conversion.public import place, shown
from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.interop import model_hub
from speedit_jax.models.build import SIZES, parse_name
from speedit_jax.reporting.curves import read_metrics
from speedit_jax.reporting.environment import read_environment
from speedit_jax.reporting.markup import duration
from speedit_jax.sampling.sampler import Settings, resolve
from speedit_jax.training import assembly, changes
from speedit_jax.training.run import Run

_LISTED = 30  # classes named on the card


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the card says that the run does not know.

    Attributes:
      weights: ema, raw or ema_DECAY.
      repository: OWNER/NAME.
      licence: as the hub spells it.
      parameters: how many.
      published: the tensors have the names of a published code.
      numbers: what was measured.
      grid: samples.png is there.
    """

    run: Run
    weights: str
    repository: str
    licence: str
    parameters: int
    published: bool
    numbers: Sequence[Number]
    grid: bool


def write(facts: Facts) -> str:
    """The whole card."""
    parts = [f"---\n{_front_matter(facts)}\n---", f"# {facts.repository.partition('/')[2]}", _what(facts)]
    if facts.grid:
        parts.append("![Samples](samples.png)\n\nSamples that training drew of the EMA weights.")
    parts += [
        "## How to load it",
        _loading(facts),
        "## How it was made",
        _making(facts),
        "## What was measured",
        _measured(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts) -> str:
    backbone, diffusion = parse_name(facts.run.config.model.name)[0], facts.run.diffusion
    return model_hub.front_matter(
        license=facts.licence,
        library_name="speedit_jax",
        pipeline_tag="text-to-image" if facts.run.model.text else "unconditional-image-generation",
        tags=[backbone.lower(), "flow-matching" if isinstance(diffusion, FlowMatching) else "diffusion", "jax"],
    ).strip()


def _what(facts: Facts) -> str:
    run = facts.run
    height, width, channels = run.model.image_shape
    draws = f"{'latents' if run.draws_latents else 'images'} of {height} x {width} x {channels}"
    names = run.class_names
    given = "text" if run.model.text else f"{len(names)} classes" if names else "no classes: it is unconditional"
    kind = "flow matching" if isinstance(run.diffusion, FlowMatching) else "diffusion"
    name = run.config.model.name
    backbone, size, _ = parse_name(name)
    sizes = (
        run.config.model[key] or usual for key, usual in zip(("width", "depth", "heads"), SIZES[backbone][size], strict=True)
    )
    form = "width {}, depth {}, heads {}".format(*sizes)
    lines = [
        f"A {name} ({form}) of {facts.parameters:,} parameters that draws {draws}, trained by {kind} on {given}."
        f" These are its {facts.weights.replace('ema', 'EMA')} weights of step {run.step:,}."
    ]
    if not run.model.text and names != [str(number) for number in range(len(names))]:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        lines.append(f"Classes, by number from 0: {', '.join(map(_plain, names[:_LISTED]))}{more}.")
    lines.append(f"Licence of the weights: {facts.licence}.")
    return "\n\n".join(lines)


def _loading(facts: Facts) -> str:
    run, workdir = facts.run, f"runs/{facts.repository.partition('/')[2]}"
    flags, python, notes = [], [], []
    drawn = "latents [16, H, W, C]" if run.draws_latents and not run.encoded_by else "uint8 [16, H, W, C]"
    if run.model.text:
        flags, python = ['--prompt="TEXT"'], ['prompts=["TEXT"]']
        encoder = place(run.text_encoder["encoder"])
        notes.append(f"Its text encoder is {encoder}; name it with --text_encoder=WHERE where it is elsewhere.")
    if run.encoded_by:
        vae = place(run.encoded_by["vae"], of_hub=True)
        notes.append(f"Its latents are those of the autoencoder {vae}; name it with --vae=WHERE where it is elsewhere.")
    names = "of the published PyTorch code" if facts.published else "of speedit_jax's parameters"
    command = " ".join(["speedit sample", f"--workdir={workdir}", *flags, "--num_images=16", "--out=samples.png"])
    return "\n\n".join(
        [
            f"With speedit_jax {__version__} or later and its extra `hub`:",
            f"```\nspeedit convert --from=hf:{facts.repository} --workdir={workdir}\n{command}\n```",
            "Or in Python, after the first of these commands:",
            f'```python\nimport speedit_jax\n\nrun = speedit_jax.load("{workdir}")\n'
            f"images = run.sample({', '.join([*python, 'num_images=16'])})  # {drawn}\n```",
            *notes,
            f"`model.safetensors` has the names {names}; `config.json` has all settings of the run.",
        ]
    )


def _making(facts: Facts) -> str:
    run = facts.run
    config, meta = run.config, shown(run.meta)
    if origin := run.meta.get("imported_from"):
        return f"The weights were imported from {place(origin)}. How they were trained is not known here."
    training, optim, data, diffusion = config.training, config.optim, config.data, config.diffusion
    settings = resolve(Settings.from_config(config.sampling, run.model, latents=run.draws_latents), run.diffusion)
    decay = f"{training.ema_decay:g}{', with warm-up' if training.ema_warmup else ''}"
    objective = f"predicts {diffusion.prediction}, loss {diffusion.loss}, variance {diffusion.variance}"
    if isinstance(run.diffusion, FlowMatching):
        objective = f"predicts the {'image' if diffusion.prediction == 'x0' else 'velocity'} on the path {diffusion.path}"
    else:
        objective += f", schedule {diffusion.schedule} of {diffusion.num_steps:,} steps"
    split = "" if data.source.partition(":")[0] in ("folder", "latents", "synthetic") else f", split {data.split}"
    rows = [
        ("data", f"{place(data.source)}{split}{', mirrored at random' if data.flip else ''}"),
        ("classes chosen", place(data.classes)),
        ("objective", objective),
        ("timesteps", assembly.make_strategy(config, run.diffusion).describe(training.batch_size)),
        ("steps", f"{run.step:,} of {training.num_steps:,}"),
        ("batch size", f"{training.batch_size:,}"),
        ("learning rate", f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup_steps:,} steps of warm-up"),
        ("weight decay", f"{optim.weight_decay:g}"),
        ("EMA", f"decay {decay}"),
        ("started from", place(config.init_from) if config.init_from else ""),
        *((f"changed at step {step:,}", changes.spelled(changed, len(changed))) for step, changed in changes.recorded(meta)),
        ("sampling", f"{settings.sampler}, {settings.num_steps} steps, guidance {settings.guidance_scale:g}"),
        ("seed", str(config.seed)),
        *_hardware(run),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.meta["versions"].items())),
    ]
    return f"{_table(('', ''), ((name, value) for name, value in rows if value))}\n\n{_settings(config)}"


def _settings(config: ml_collections.ConfigDict) -> str:
    """What no row says, of all that was chosen."""
    defaults, chosen = flatten(get_config().to_dict()), flatten(shown(config.to_dict()))
    changed = "\n".join(f"{key} = {json.dumps(value)}" for key, value in chosen.items() if value != defaults.get(key))
    return f"All settings other than the defaults of speedit_jax {__version__}:\n\n```ini\n{changed}\n```"


def _hardware(run: Run) -> Iterable[tuple[str, str]]:
    sessions = [session for session in read_environment(run.workdir) if session.get("first_step", 0) < run.step]
    yield "devices", "; ".join(dict.fromkeys(f"{session.get('devices')} x {session.get('device_kind')}" for session in sessions))
    steps, spent = read_metrics(run.workdir).get("time_total", ((), ()))
    seconds = [float(value) for step, value in zip(steps, spent, strict=True) if step <= run.step]
    yield "time spent", duration(seconds[-1]) if seconds else ""


def _measured(facts: Facts) -> str:
    if not facts.numbers:
        return "Nothing was measured of these weights in the run's directory."
    head = ("metric", "value", "step", "what it is", "measured on")
    return _table(head, ((n.name, f"{n.value:.5g}", f"{n.step:,}", n.meaning, n.of) for n in facts.numbers))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """As Markdown shows it as it is."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
