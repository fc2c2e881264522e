"""The attention guide's tables and pictures, computed from the patterns themselves and from records, never typed.

``python -m benchmarks.attention_page --collect`` first copies the newest records of long documents from runs/; recall's
are written by ``python examples/recall.py --record benchmarks/records/recall.jsonl``, those of layouts are copied from
runs/layouts.jsonl after ``python -m benchmarks.bench_layouts``, and hf-attention.jsonl holds the rows that
``python -m benchmarks.bench_hf_attention`` left in runs/benchmarks.jsonl.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.attention_pictures import pattern_picture, recall_picture
from benchmarks.readme_tables import RECORDS, ROOT, Line, by_machine, machine, read, speed, table
from sparse_attn import causal, parse_pattern
from transformer.layer_config import AttentionConfig
from transformer.selection_config import (
    DSAConfig,
    KMeansConfig,
    LSHConfig,
    MoBAConfig,
    NSAConfig,
    SelectionConfig,
    SinkhornConfig,
    TopKKeysConfig,
)
from transformer.selection_cost import selection_flops

PAGE = ROOT / "docs" / "guides" / "attention.md"
PICTURES = ROOT / "docs" / "guides" / "attention"
RECALL, LONG, SPEEDS, CHOICES, LAYOUTS, LAYERS = (
    RECORDS / f"{name}.jsonl"
    for name in ("recall", "long-documents", "patterns", "selections", "layouts", "hf-attention")
)
SIDE, LENGTH, HEADS, HEAD_DIM = 48, 4096, 4, 64


@dataclass(frozen=True)
class Entry:
    """A pattern of the gallery: small, as it is drawn; large, as it is counted; its rule and source."""

    name: str
    drawn: str
    counted: str
    rule: str
    source: str


CHILD, LONGFORMER, BIGBIRD = "Child et al. 2019, 1904.10509", "Beltagy et al. 2020, 2004.05150", "2007.14062"
GALLERY = (
    Entry("causal", "causal()", "causal()", "j ≤ i", "decoder"),
    Entry("sliding_window", "sliding_window(8)", "sliding_window(256)", "abs(i − j) < w", f"{CHILD}; {LONGFORMER}"),
    Entry("dilated", "dilated(6, 3)", "dilated(256, 2)", "i − j = m·d, abs(m) < w", LONGFORMER),
    Entry("strided", "strided(8)", "strided(64)", "abs(i − j) < s, or s divides i − j", CHILD),
    Entry("fixed", "fixed(8, 1)", "fixed(64, 4)", "same row of w, or one of its last c columns", CHILD),
    Entry("axial", "axial(8)", "axial(64)", "same row or same column of a grid", "Ho et al. 2019, 1912.12180"),
    Entry("sinks", "sliding_window(8) | sinks(3)", "sliding_window(256) | sinks(4)", "window, or j < n",
          "StreamingLLM, 2309.17453"),
    Entry("global_tokens", "sliding_window(5) | global_tokens([0, 16, 32])",
          "sliding_window(256) | global_tokens([0, 1024, 2048, 3072])", "window, or i or j is global", LONGFORMER),
    Entry("random_blocks", "random_blocks(2, 4)", "random_blocks(3, 64)", "blocks drawn by (seed, query block)",
          f"BigBird, {BIGBIRD}"),
    Entry("bigbird", "bigbird(5, 3, 1, 4)", "bigbird(192, 64, 3)", "window, global and random blocks",
          f"BigBird, {BIGBIRD}"),
    Entry("block_sparse", "block_sparse([[0], [0, 1], [1, 2], [0, 3], [2, 4], [0, 5]], 8)",
          "block_sparse([[0], [0, 1], [1, 2], [0, 3], [2, 4], [0, 5]], 683)", "any table of blocks", CHILD),
    Entry("documents", "documents([11, 23, 14])", "documents([1000, 2000, 1096])", "i and j in one document",
          "packing"),
    Entry("prefix_lm", "prefix_lm(16)", "prefix_lm(1024)", "j ≤ i, or j < n", "Raffel et al. 2020, 1910.10683"),
)  # fmt: skip
# names whose rule already holds j ≤ i, or that look ahead on purpose
BIDIRECTIONAL = ("causal", "prefix_lm")

SELECTED: tuple[tuple[str, SelectionConfig, str, str], ...] = (
    ("top_k", TopKKeysConfig(512), "the k keys of highest score", "exact scores"),
    ("moba", MoBAConfig(64, 8), "the blocks whose mean key fits best", "2502.13189"),
    ("nsa", NSAConfig(), "compressed keys, selected blocks, a window; gated", "2502.11089"),
    ("dsa", DSAConfig(512), "the keys that a small indexer scores highest", "DeepSeek-V3.2"),
    ("lsh", LSHConfig(16, 2, 64), "keys of the same hash bucket", "Reformer, 2001.04451"),
    ("kmeans", KMeansConfig(16, 64), "keys of the nearest centroid", "2003.05997"),
    ("sinkhorn", SinkhornConfig(64, 64), "the own block and a soft mix of earlier ones", "2002.11296"),
)


def seen(entry: Entry, text: str) -> str:
    """The text of a decoder's pattern, or of one that is drawn as it is."""
    return text if entry.name in BIDIRECTIONAL else f"causal() & ({text})"


def patterns(lines: list[Line]) -> str:
    """The gallery: rule, source, picture, density, FLOPs."""
    dense = causal().flops(LENGTH, head_dim=HEAD_DIM, num_heads=HEADS)
    rows = []
    for entry in GALLERY:
        pattern = parse_pattern(seen(entry, entry.counted))
        flops = pattern.flops(LENGTH, head_dim=HEAD_DIM, num_heads=HEADS)
        rows.append([
            f"`{_cell(entry.drawn)}`<br>{entry.rule}<br>{entry.source}",
            f"![{entry.name}](attention/{entry.name}.svg)",
            f"`{_cell(entry.counted)}`",
            f"{pattern.density(LENGTH):.2%}",
            f"{flops / 1e9:.2f}",
            f"{flops / dense:.3f}",
        ])  # fmt: skip
    head = ["pattern as drawn, rule, source", "picture", f"at {LENGTH:,} tokens", "density", "GFLOPs", "of causal"]
    return table(head, rows) + f"\n\nGFLOPs: scores and mixing of {HEADS} heads of {HEAD_DIM} channels, forward."


def selections(lines: list[Line]) -> str:
    """What choosing and attending cost at two lengths, against causal attention."""
    rows = []
    for kind, record, rule, source in SELECTED:
        attention = AttentionConfig(HEADS, HEADS, HEAD_DIM, selection=record)
        shares = [
            selection_flops(HEADS * HEAD_DIM, attention, length)
            / causal().flops(length, head_dim=HEAD_DIM, num_heads=HEADS)
            for length in (LENGTH, 4 * LENGTH)
        ]
        rows.append([f"`{kind}`: {rule}", source, f"`{record}`", *(f"{share:.3f}" for share in shares)])
    head = ["selection", "source", "sizes", f"FLOPs of causal at {LENGTH:,}", f"at {4 * LENGTH:,}"]
    return table(head, rows) + "\n\nThe cost of choosing is included; LSH and k-means as for evenly filled buckets."


def recall(lines: list[Line]) -> str:
    """Recall near, far and farthest."""
    rows = [
        [line["choice"], f"`{_cell(line['attention'])}`", *(f"{_mean(line['curve'][part]):.0%}" for part in PARTS)]
        for line in lines
        if line["name"] == "recall"
    ]
    head = ["", "attention of both layers", "1 to 10 back", "11 to 40 back", "the first three tokens"]
    return table(head, rows)


PARTS = (slice(0, 10), slice(10, 40), slice(-3, None))


def long_documents(lines: list[Line]) -> str:
    """Memory and speed of training on long documents."""
    found = [line for line in lines if line["name"] == "long_documents"]
    rows = [
        [
            line["conditions"]["contender"], f"{line['peak_bytes'] / 2**30:.2f} GiB",
            f"{line['tokens_per_s']:,.0f}", f"{line['median_s']:.1f} s", f"{line['flops'] / 1e12:.2f}",
        ]
        for line in found
    ]  # fmt: skip
    one = found[0]
    return (
        table(["", "peak memory", "tokens/s", "a step", "TFLOPs of a step"], rows)
        + f"\n\n{one['conditions']['length']:,} tokens, batch 1, {one['conditions']['layers']} layers of width "
        + f"{one['conditions']['dim']}; the sparse pattern is `{_cell(one['pattern'])}`. {machine(one)} with "
        + f"{one['threads']} threads, torch {one['torch']}, commit {one['commit']}, each contender in a process of its "
        + f"own: {', '.join(sorted({'`python ' + line['command'] + '`' for line in found}))}."
    )


def speeds(lines: list[Line]) -> str:
    """Each pattern's speed-up over causal SDPA, beside what its visited blocks promise; a table for each length and
    machine."""
    found = [line for line in lines if line["name"].startswith("pattern_")]
    lengths = dict.fromkeys(line["conditions"]["L"] for line in found)
    return "\n\n".join(
        by_machine([line for line in found if line["conditions"]["L"] == length], _speeds) for length in lengths
    )


def _speeds(found: list[Line]) -> str:
    times = {(line["name"], line["conditions"]["passes"]): line for line in found}
    rows = []
    for name in dict.fromkeys(line["name"] for line in found):
        both = times[name, "forward+backward"]
        promise = both["conditions"].get("promise")
        rows.append([
            name.removeprefix("pattern_").replace("_", " "), "" if promise is None else f"{promise:.2f}",
            *(f"{times[name, passes]['median_s'] * 1e3:.1f} ms" for passes in ("forward", "forward+backward")),
            "" if promise is None else f"{both['conditions']['speedup']:.2f}",
            "" if promise is None else f"{both['conditions']['share']:.0%}",
        ])  # fmt: skip
    head = ["", "promise", "forward", "forward + backward", "times as fast", "of the promise"]
    return table(head, rows) + f"\n\n{_made(found[0])}"


def layers(lines: list[Line]) -> str:
    """Whole self-attentions beside Hugging Face's."""
    return by_machine([line for line in lines if line["name"].startswith("layer_")], speed)


def selection_speeds(lines: list[Line]) -> str:
    """What choosing and attending take, as a share of causal SDPA's time."""
    found = [line for line in lines if line["name"].startswith("selection_")]
    times = {_place(line): line for line in found}
    rows = []
    for length, groups, name in dict.fromkeys(_place(line)[:3] for line in found):
        pair = [times[length, groups, name, passes] for passes in ("forward", "forward+backward")]
        ratios = [line["ratios"].get("sdpa_causal") for line in pair]
        rows.append([
            name.removeprefix("selection_").replace("_", " "), f"{length:,}", f"{groups}",
            *(f"{line['median_s'] * 1e3:,.0f} ms" for line in pair),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ])  # fmt: skip
    head = [
        "",
        "positions",
        "query heads a key head",
        "forward",
        "forward + backward",
        "of SDPA, forward",
        "and backward",
    ]
    return table(head, rows) + f"\n\n{_made(found[0], length=False)}"


def layouts(lines: list[Line]) -> str:
    """What building the layout of a million positions takes, in blocks, time and memory."""
    found = {_size(line): line for line in lines if line["name"] == "layout"}
    rows = []
    for name in dict.fromkeys(name for name, *_ in found):
        first, coarse, short = (found[name, *size] for size in ((10**6, 64), (10**6, 128), (10**5, 64)))
        sizes = first["conditions"]
        rows.append([
            name, f"{sizes['visited']:,}", f"{sizes['partial']:,}", f"{sizes['masks']:,}",
            f"{first['median_s']:.3f} s", f"{sizes['ns_a_block']:.0f}", f"{sizes['peak_MiB']:,.0f} MiB",
            f"{coarse['median_s']:.3f} s", f"{short['median_s']:.4f} s",
        ])  # fmt: skip
    head = [
        "",
        "blocks",
        "partial",
        "masks",
        "time",
        "ns a block",
        "memory",
        "in blocks of 128",
        "of 100,000 positions",
    ]
    one = next(iter(found.values()))
    return (
        table(head, rows)
        + "\n\nSeconds of the processor on one thread, median of three builds; memory: the highest of a build. "
        + f"{machine(one)}, commit {one['commit']}: `python {one['command']}`."
    )


def _size(line: Line) -> tuple[str, int, int]:
    return line["conditions"]["pattern"], line["conditions"]["L"], line["conditions"]["block"]


def _place(line: Line) -> tuple[int, int, str, str]:
    sizes = line["conditions"]
    return sizes["L"], sizes["H"] // sizes["Hkv"], line["name"], sizes["passes"]


def _made(line: Line, *, length: bool = True) -> str:
    sizes = line["conditions"]
    positions = f"{sizes['L']:,} positions, " if length else ""
    return (
        f"{positions}{sizes['H']} heads of {sizes['d']}, {sizes['dtype']}. {machine(line)} with {line['threads']} "
        f"threads, torch {line['torch']}, commit {line['commit']}: `python {line['command']}`."
    )


TABLES: dict[str, Callable[[list[Line]], str]] = {
    "patterns": patterns,
    "layouts": layouts,
    "speeds": speeds,
    "layers": layers,
    "selections": selections,
    "selection_speeds": selection_speeds,
    "recall": recall,
    "long_documents": long_documents,
}


def fill(text: str, lines: list[Line]) -> str:
    """``text`` with every marked table replaced. Raises: ValueError if a marker names no table."""

    def replaced(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {name!r}")
        return f"<!-- table: {name} -->\n{TABLES[name](lines)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def pictures(lines: list[Line]) -> dict[str, str]:
    """Every picture by its file's name."""
    drawn = {
        f"{entry.name}.svg": pattern_picture(parse_pattern(seen(entry, entry.drawn)).layout(SIDE, block=16).to_mask())
        for entry in GALLERY
    }
    curves = {line["choice"]: line["curve"] for line in lines if line["name"] == "recall"}
    return {**drawn, "recall.svg": recall_picture(curves, guess=1 / 8)}


def records() -> list[Line]:
    """The committed records that the page is made from."""
    return [*read(RECALL), *read(LONG), *read(SPEEDS), *read(CHOICES), *read(LAYOUTS), *read(LAYERS)]


def collect() -> None:
    """Copy the newest record of each contender from runs/. Raises: FileNotFoundError if there is none."""
    newest = {line["conditions"]["contender"]: line for line in read(ROOT / "runs" / "long-documents.jsonl")}
    if not newest:
        raise FileNotFoundError("runs/long-documents.jsonl must hold records: run python -m benchmarks.long_documents")
    LONG.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in newest.values()))


def _cell(text: str) -> str:
    # a table's column ends at a bar, inside code too
    return text.replace("|", "\\|")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Collect if asked, then write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="first copy the records of the newest runs")
    if parser.parse_args().collect:
        collect()
    lines = records()
    PAGE.write_text(fill(PAGE.read_text(), lines))
    PICTURES.mkdir(exist_ok=True)
    for name, text in pictures(lines).items():
        (PICTURES / name).write_text(text)


if __name__ == "__main__":
    main()
