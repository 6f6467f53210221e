"""The pages about strategies, backbones and other methods, their tables and figures, from the raw numbers of benchmarks.speedup.

  python -m benchmarks.speedup.report --scale=cpu

Writes OUT/speedup_SCALE.md, figures, and where DiG is compared OUT/speedup_SCALE_dig.md. A number whose runs are not made is "not
measured yet".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.speedup.analysis import (
    SHARES,
    SpeedUp,
    curve,
    distance,
    missing,
    over_plain,
    planned_seeds,
    read,
    seeds_of,
    speed_up,
)
from benchmarks.speedup.data import RAW
from benchmarks.speedup.plan import (
    ATTEMPTS,
    BACKBONES,
    BASELINE,
    FACTORS,
    FIRST,
    PAIRS,
    RATES,
    SCALES,
    SECOND,
    STRATEGIES,
    WITHOUT,
    Piece,
    pieces,
    share_of_flops,
)
from speedit_jax.errors import UserError
from speedit_jax.storage import write_text

NOT_YET = "not measured yet"
# Times fewer steps, as published: DiT-XL/2 on ImageNet at 256 pixels, and the title of arXiv 2405.17403.
CLAIMS = {"speedit": 3.3, "speed_cvpr25": 3.0}

TUNED = ("uniform_lr_half", "uniform_lr_double")
TIMESTEPS = [name for name in STRATEGIES if name not in BACKBONES]
# (strategy, what it is compared with): the baseline, and for some another one that is more like them.
COMPARED = [(name, of) for name in TIMESTEPS if name != BASELINE for of in dict.fromkeys((BASELINE, PAIRS.get(name, BASELINE)))]
Records = dict[Piece, dict]


def shared_seeds(records: Records, image_set: str, *strategies: str) -> list[int]:
    """Those of which all of these are complete."""
    return sorted(set.intersection(*({*seeds_of(records, image_set, strategy)} for strategy in strategies)))


def speed_ups(records: Records, image_set: str, strategy: str, baseline: str) -> list[SpeedUp] | None:
    """One for each of SHARES, from the seeds of which both sides are complete; None where there are none."""
    seeds = shared_seeds(records, image_set, strategy, baseline)
    if not seeds:
        return None
    slow, fast = (curve(records, image_set, of, seeds) for of in (baseline, strategy))
    return [speed_up(slow, fast, share) for share in SHARES]


def show(found: SpeedUp, seeds: int) -> str:
    ratio = f"{'' if found.reached else '< '}{found.ratio:.2f}"
    return f"{ratio} ({found.low:.2f} to {found.high:.2f})" if seeds > 1 else ratio


def last_rows(records: Records, image_set: str, strategy: str) -> list[dict]:
    return [records[p]["rows"][-1] for p in records if (p.set, p.strategy) == (image_set, strategy) and records[p]["complete"]]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g}" + (f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else "")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]


def speed_table(records: Records, scale: str, image_set: str, compared: list[tuple[str, str]]) -> list[str]:
    rows, without = [], []
    for strategy, baseline in compared:
        planned = planned_seeds(scale, image_set, strategy)
        if found := speed_ups(records, image_set, strategy, baseline):
            seeds = len(shared_seeds(records, image_set, strategy, baseline))
            rows.append([f"`{strategy}`", f"`{baseline}`", f"{seeds} of {planned}", *(show(one, seeds) for one in found)])
        elif planned:
            without.append(f"`{strategy}`")
    without = list(dict.fromkeys(without))
    header = ["", "baseline", "seeds", *(f"to the baseline's quality at {share:.0%}" for share in SHARES)]
    intro = "Speed-up in steps, with the 5th and 95th percentile over seeds; `<` where the target was not reached:"
    lines = [intro, "", *table(header, rows), ""] if rows else []
    return [*lines, f"{NOT_YET.capitalize()}: {', '.join(without)}."] if without else lines[:-1]


def quality_table(records: Records, image_set: str, strategies: list[str]) -> list[str]:
    rows = []
    for strategy in strategies:
        if not (found := last_rows(records, image_set, strategy)):
            continue
        weights = {name: [row["weights"][name] for row in found] for name in ("ema", "slow_ema", "raw")}
        cells = [spread([of["fd"] for of in weights[name]]) for name in weights]
        cells += [spread([of[name] for of in weights["ema"]]) for name in ("kid", "accuracy")]
        mse = np.mean([of["mse"] for of in weights["ema"]], axis=0)
        rows.append([f"`{strategy}`", *cells, *(f"{value:.4f}" for value in mse)])
    judge = next(record["judge"] for piece, record in records.items() if piece.set == image_set)
    real = [f"{judge['floor']['fd']:.3g}", "", "", f"{judge['floor']['kid']:.3g}", f"{judge['accuracy']:.3f}"]
    rows.append(["held-out real images", *real, *[""] * 4])
    header = ["at the end", "FD, ema", "slow ema", "raw", "KID", "accuracy", *(f"mse, quarter {i}" for i in (1, 2, 3, 4))]
    return table(header, rows)


def verdict(records: Records, scale: str, image_set: str, strategy: str) -> str:
    """One sentence on a claim, and never more than the runs say."""
    left = [p for p in missing(records, scale, image_set) if p.strategy in (strategy, BASELINE)]
    if left:
        return f"`{strategy}` on {image_set}: {NOT_YET}; {len(left)} runs are missing."
    *_, end = speed_ups(records, image_set, strategy, BASELINE)
    seeds = len(shared_seeds(records, image_set, strategy, BASELINE))
    low, high = round(end.low, 2), round(end.high, 2)  # as they are shown
    if not end.reached or high < 1:
        outcome = "not reproduced: it is no faster than uniform here"
    elif low <= 1:
        outcome = "not shown: seeds differ more than strategies"
    elif end.ratio < CLAIMS[strategy]:
        outcome = "partly reproduced: faster than uniform, by less than was published"
    else:
        outcome = "reproduced"
    result = f"Speed-up to uniform's final quality: {show(end, seeds)}; published: {CLAIMS[strategy]}"
    return f"`{strategy}` on {image_set}: {outcome}. {result}. {tuned_baseline(records, image_set)}"


def tuned_baseline(records: Records, image_set: str) -> str:
    """What uniform timesteps gain by another learning rate, which a strategy has to beat, too."""
    found = {name: speed_ups(records, image_set, name, BASELINE) for name in TUNED}
    seeds = {name: len(shared_seeds(records, image_set, name, BASELINE)) for name in TUNED}
    gains = [f"{show(of[-1], seeds[name])} of `{name}`" for name, of in found.items() if of]
    return f"That of uniform with other learning rates: {', '.join(gains) or NOT_YET}."


def confirmed(records: Records, image_set: str, strategy: str = "speedit_v") -> str:
    """One sentence on the attempt beyond SpeeDiT that was run in full."""
    gains = []
    for baseline in (BASELINE, PAIRS[strategy]):
        if found := speed_ups(records, image_set, strategy, baseline):
            gains.append(f"of `{baseline}` {show(found[-1], len(shared_seeds(records, image_set, strategy, baseline)))}")
    result = f"speed-up to the final quality {', '.join(gains)}" if gains else NOT_YET
    return f"`{strategy}` on {image_set}, the best of [ten attempts](speedup_tuning.md) to be faster: {result}."


def backbone_verdict(records: Records, scale: str, image_set: str, dig: str) -> str:
    """One sentence on DiG's final distance over DiT's, of the seeds that both have."""
    dit = BACKBONES[dig]
    seeds = seeds_of(records, image_set, dig)
    if len(seeds) < planned_seeds(scale, image_set, dig) or not {*seeds} <= {*seeds_of(records, image_set, dit)}:
        return f"`{dig}` against `{dit}` on {image_set}: {NOT_YET}."
    ours, theirs = (curve(records, image_set, name, seeds).distances[:, -1] for name in (dig, dit))
    ratios = ours / theirs
    outcome = "DiG is better" if ratios.max() < 1 else "DiT is better" if ratios.min() > 1 else "seeds disagree"
    over = f"its final Fréchet distance over DiT's, by seed: {spread(list(ratios))}"
    return f"`{dig}` against `{dit}` on {image_set}: {outcome}; {over}."


def draw(
    records: Records, image_set: str, sides: dict[str, list[str]], path: Path, shares: dict[str, float] | None = None
) -> bool:
    """Fréchet distance against steps, of the complete runs; whether there are any.

    Args:
      sides: title of a panel -> strategies.
      shares: strategy -> FLOPs of its step, of a plain one; the distances are drawn against FLOPs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = dict.fromkeys(name for side in sides.values() for name in side)
    curves = {name: found for name in names if (found := curve(records, image_set, name))}
    if not curves:
        return False
    figure, axes = plt.subplots(1, len(sides), figsize=(6 * len(sides), 5.5), layout="constrained", sharey=True, squeeze=False)
    for axis, (title, names) in zip(axes[0], sides.items(), strict=True):
        for i, name in enumerate(name for name in names if name in curves):
            found, colour = curves[name], "black" if name == BASELINE else f"C{i % 10}"
            x = found.steps * (shares or {}).get(name, 1)
            axis.plot(x, found.distances.mean(0), color=colour, ls="-" if i < 10 else "--", label=name)
            axis.fill_between(x, found.distances.min(0), found.distances.max(0), color=colour, alpha=0.15, lw=0)
        axis.set(title=title, xlabel="FLOPs, in plain steps" if shares else "steps", yscale="log")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0, 0].set_ylabel("Fréchet distance in the judge's features, ema")
    figure.suptitle(f"{image_set}: mean over seeds, and their range")
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def unfinished(records: Records, scale: str) -> list[str]:
    """What is known of runs that were begun: never part of a comparison."""
    lines = []
    for piece, record in records.items():
        if not record["complete"]:
            line = f"- `{piece.name}`: step {record['step']} of {SCALES[scale].num_steps}"
            for row in record["rows"][-1:]:
                line += f"; Fréchet distance {distance(row):.3g} at step {row['step']}"
            lines.append(line)
    return lines


def opening(records: Records, scale: str, title: str) -> list[str]:
    of, done = SCALES[scale], sum(record["complete"] for record in records.values())
    sessions = [session for record in records.values() for session in record["sessions"]]
    commits, devices = (", ".join(sorted({session[name] for session in sessions})) or "-" for name in ("commit", "device"))
    return [
        f"# {title} Scale `{scale}`",
        "",
        f"{done} of {len(pieces(scale))} runs are made. [The protocol](speedup_protocol.md) says what was run and what the",
        "numbers mean. This page is written by its script from the raw numbers in `speedup/`:",
        "",
        f"    python -m benchmarks.speedup --scale={scale} --budget_s=3600",
        f"    python -m benchmarks.speedup.report --scale={scale}",
        "",
        f"Commits {commits}; devices {devices}.",
        f"A run is {of.num_steps} steps of {of.batch_size} images.",
        "The distances are in the features of the judge, a small network of this comparison, and are **not** Inception's FID.",
        "",
    ]


def of_set(
    records: Records, scale: str, image_set: str, compared: list[tuple[str, str]], sides: dict[str, list[str]], figure: Path
) -> list[str]:
    """The tables and the figure of one image set.

    Args:
      compared: strategies that have a speed-up, and over what.
      sides: of `draw`.
    """
    names = list(dict.fromkeys(name for side in sides.values() for name in side))
    lines = ["", f"## {image_set}", ""]
    if not any(piece.set == image_set and piece.strategy in names for piece in records):
        return [*lines, f"{NOT_YET.capitalize()}."]
    lines += [*speed_table(records, scale, image_set, compared), "", *quality_table(records, image_set, names)]
    if draw(records, image_set, sides, figure):
        lines += ["", f"![Fréchet distance against steps]({figure.name})"]
    return lines


def page(records: Records, scale: str, out: Path) -> str:
    """About the strategies; its figures are written to `out`."""
    lines = opening(records, scale, "Is SpeeDiT faster? Which strategy should you take?")
    lines += ["## Verdicts", ""]
    lines += [f"- {verdict(records, scale, name, strategy)}" for name in SCALES[scale].sets for strategy in FIRST[1:]]
    lines += [f"- {confirmed(records, name)}" for name in SCALES[scale].sets]
    alike = [name for name in TIMESTEPS if all(key.startswith("timesteps.") for key in STRATEGIES[name])]
    sides = {
        "as published": list(FIRST),
        "other timesteps": [name for name in alike if name not in FIRST[1:]],
        "other predictions and learning rates": [BASELINE, *(name for name in TIMESTEPS if name not in alike)],
    }
    for name in SCALES[scale].sets:
        lines += of_set(records, scale, name, COMPARED, sides, out / f"speedup_{scale}_{name}.png")
    if begun := unfinished(records, scale):
        lines += ["", "## Runs on their way", "", "They count for nothing above.", "", *begun]
    return "\n".join(lines) + "\n"


def backbone_page(records: Records, scale: str, out: Path) -> str:
    """About DiG; its figures are written to `out`."""
    lines = opening(records, scale, "Is DiG as good as DiT?")
    lines += [
        "At as many parameters, to 1 %, and as many steps. [resolution.md](resolution.md) says what a step costs.",
        "",
    ]
    pairs = {name: {dig: dit for dig, dit in BACKBONES.items() if planned_seeds(scale, name, dig)} for name in SCALES[scale].sets}
    lines += [f"- {backbone_verdict(records, scale, name, dig)}" for name, of in pairs.items() for dig in of]
    for name, of in pairs.items():
        sides = {"DiG and DiT": [*of.values(), *of]}
        lines += of_set(records, scale, name, list(of.items()), sides, out / f"speedup_{scale}_{name}_dig.png")
    return "\n".join(lines) + "\n"


def tuning_page(records: Records, scale: str, out: Path) -> str:
    """About the attempts, the best one first; its figure is written to `out`."""
    (image_set,) = SCALES[scale].sets
    done = {piece.strategy: record["rows"] for piece, record in records.items() if record["complete"]}
    lines = opening(records, scale, "Is another setting faster than SpeeDiT?")
    lines += [
        "One seed each, so a difference of a tenth may be chance. `benchmarks/speedup/plan.py` says what each changes; the",
        "protocol says what follows from this table.",
        "",
    ]
    attempts = [name for name in done if name in ("speedit", *ATTEMPTS)]
    rows = []
    for name in sorted(attempts, key=lambda name: distance(done[name][-1])):
        distances = [f"{distance(row):.3g}" for row in done[name][1::2]]
        rows.append([f"`{name}`", *distances, f"{done[name][-1]['weights']['ema']['accuracy']:.3f}"])
    lines += table(["", *(f"FD at {row['step']}" for row in next(iter(done.values()), [])[1::2]), "accuracy"], rows)
    figure = out / f"speedup_{scale}.png"
    if draw(records, image_set, {"attempts": ["speedit", *ATTEMPTS]}, figure):
        lines += ["", f"![Fréchet distance against steps]({figure.name})"]
    lines += ["", "## Learning rates", "", f"FD at the end, and accuracy, at multiples of {SCALES[scale].learning_rate:g}:", ""]
    rows = []
    for (strategy, prediction), names in RATES.items():
        ends = [done[name][-1] if name in done else None for name in names]
        cells = [f"{distance(row):.3g}, {row['weights']['ema']['accuracy']:.3f}" if row else NOT_YET for row in ends]
        rows.append([f"{strategy}, {prediction} predicted", *cells])
    lines += table(["", *(f"{factor:g}" for factor in FACTORS)], rows)
    return "\n".join(lines) + "\n"


def method_verdict(ratios: list[float], planned: int) -> str:
    """In plain words, of a method's distances over those without it at equal FLOPs."""
    said = "pays" if max(ratios) < 1 else "does not pay" if min(ratios) > 1 else "seeds disagree"
    return said if len(ratios) == planned else f"{said}, {len(ratios)} of {planned} seeds"


def methods_page(records: Records, scale: str, out: Path) -> str:
    """About methods besides the timesteps; its figure is written to `out`.

    Args:
      records: of the runs without them, too.
    """
    (image_set,) = SCALES[scale].sets
    lines = opening({piece: record for piece, record in records.items() if piece.scale == scale}, scale, "Do other methods pay?")
    lines += [
        "[acceleration.md](../acceleration.md) says what the methods do. The table has means over seeds, and their range. A",
        "method is better where the distance with it over the distance without it is below 1.",
        "",
    ]
    rows, shares, without = [], {}, []
    for name, baseline in WITHOUT.items():
        second = SECOND.get(name)
        seeds = shared_seeds(records, image_set, name, baseline, *([second] if second else []))
        if not seeds:
            without.append(f"`{name}`")
            continue
        shares[name] = share_of_flops(name, baseline)
        plain, method = (curve(records, image_set, of, seeds) for of in (baseline, name))
        ends = [of.distances[:, -1] for of in (plain, method)]
        phase = (curve(records, image_set, second, seeds), share_of_flops(second, baseline)) if second else None
        equal_flops = over_plain(plain, method, shares[name], phase)
        cells = [f"{shares[name]:.2f}", *map(spread, ends), spread(ends[1] / ends[0]), spread(equal_flops)]
        planned = planned_seeds(scale, image_set, name)
        rows.append([f"`{name}`", f"`{baseline}`", *cells, method_verdict(equal_flops, planned)])
    header = ["method", "without it", "FLOPs of a step", "FD without", "FD with", "with / without", "at equal FLOPs", "verdict"]
    lines += table(header, rows)
    lines += ["", f"{NOT_YET.capitalize()}: {', '.join(without)}."] if without else []
    figure = out / f"speedup_{scale}.png"
    sides = {of: [of, f"{of}_route"] for of in ("uniform", "speedit")}
    if draw(records, image_set, sides, figure, shares):
        lines += ["", f"![Fréchet distance against FLOPs]({figure.name})"]
    return "\n".join(lines) + "\n"


# scale -> end of the file's name -> page; of the others OTHERS.
PAGES = {"tuning": {"": tuning_page}, "methods": {"": methods_page}, "cpu256": {"_dig": backbone_page}}
OTHERS = {"": page, "_dig": backbone_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--raw", type=Path, default=RAW, help="raw numbers")
    parser.add_argument("--out", type=Path, default=RAW.parent, help="directory of the page and its figures")
    args = parser.parse_args()
    try:
        records = read(args.raw, args.scale, *(["cpu"] if args.scale == "methods" else []))
    except UserError as e:
        raise SystemExit(f"error: {e}") from e
    for name, text in PAGES.get(args.scale, OTHERS).items():
        path = args.out / f"speedup_{args.scale}{name}.md"
        write_text(path, text(records, args.scale, args.out))
        done = sum(record["complete"] for piece, record in records.items() if piece.scale == args.scale)
        print(f"{path}: {done} of {len(pieces(args.scale))} runs")


if __name__ == "__main__":
    main()
