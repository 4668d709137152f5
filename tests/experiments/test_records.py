"""The record, the floors, the ranks and the table of an experiment: known answers, no network."""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from invlib import experiments
from invlib.attacks.auto import best
from invlib.attacks.published import inverting_gradients
from invlib.core import files
from invlib.core.fingerprint import describe
from invlib.errors import ConfigError, DataError, UnknownNameError
from invlib.experiments import plan
from invlib.experiments import record as _record
from invlib.federated import FedAvg
from invlib.metrics import identification
from invlib.optim import objectives

# Whatever else is measured is kept beside them, as growth-cpu.jsonl is.
RESULTS = [
    path
    for path in sorted((Path(__file__).parents[2] / "data" / "results").glob("*.jsonl"))
    if path.stem.partition("-")[0] in experiments.EXPERIMENTS
]


def row(case="LeNetZhu, cosine", image=0, *, psnr=(20.0,), ranks=(1,), reduced=True, paper=None, **more):
    columns = dict(zip(("network", "attack"), case.split(", "), strict=True))
    return {
        "experiment": "table1",
        "key": "k",
        "case": case,
        "image": image,
        "columns": columns,
        "paper": paper,
        "sweep": None,
        "series": "",
        "settings": {
            "dataset": "patches32",
            "split": "train",
            "steps": 5,
            "restarts": 1,
            "seed": 0,
            "reduced": reduced,
            "labels": "known",
        },
        "psnr": list(psnr),
        "ssim": [0.5] * len(psnr),
        "rank_ssim": list(ranks),
        "rank_features": [2] * len(psnr),
        "floors": [{"grey": 10.0, "mean": 11.5, "class": None}] * len(psnr),
        "labels_right": len(psnr),
        "evaluations": 7,
        "candidates": 60,
        "device": "cpu",
        "reconstruction": files.png(torch.full((len(psnr), 3, 4, 4), 0.2)),
        "truth": files.png(torch.full((len(psnr), 3, 4, 4), 0.8)),
        **more,
    }


PLAIN = row("a, b")


def write(path, rows):
    path.write_bytes(b"".join(map(files.encode, rows)))
    return path


# The record


def test_every_cut_of_a_record_is_completed_to_the_same_bytes(tmp_path):
    rows = [{**PLAIN, "image": k, "word": "ö\n"} for k in range(2)]
    path = write(tmp_path / "r.jsonl", rows)
    whole = path.read_bytes()
    for cut in range(len(files.encode(rows[0])) - 1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        with _record.opened(path) as record:
            assert record.rows == rows[: whole[:cut].count(b"\n")]
            for missing in rows[len(record.rows) :]:
                record.append(missing)
        assert path.read_bytes() == whole


def test_a_reader_leaves_the_torn_line_alone(tmp_path):
    path = write(tmp_path / "r.jsonl", [PLAIN, PLAIN])
    torn = path.read_bytes()[:-3]
    path.write_bytes(torn)
    assert _record.read(path) == [PLAIN]
    assert path.read_bytes() == torn


def test_infinity_and_nan_are_json_that_float_reads():
    line = files.encode({"psnr": [float("inf")], "score": float("nan"), "nested": {"x": float("-inf")}})
    assert json.loads(line) == {"psnr": ["inf"], "score": "nan", "nested": {"x": "-inf"}}
    assert line.endswith(b"\n")


@pytest.mark.parametrize("line", [b"{]\n", b"[1]\n", b'{"experiment": "table1"}\n'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    path.write_bytes(files.encode(PLAIN) + line + files.encode(PLAIN))
    with pytest.raises(DataError, match="line 2"):
        _record.read(path)
    with pytest.raises(DataError, match="line 2"), _record.opened(path):
        pass
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(
    "change",
    [
        *({name: ...} for name in row("a, b") if name not in ("place", "score")),
        *(
            {name: value}
            for name in ("image", "psnr", "settings", "columns", "floors")
            for value in (None, "x", 1.5)
        ),
        {"psnr": []},
        {"psnr": [20.0, 21.0]},
        {"psnr": ["good"]},
        {"ssim": [None]},
        {"rank_ssim": ["first"]},
        {"floors": [3]},
        {"floors": [{"grey": 1.0}]},
        {"floors": [{"grey": "x", "mean": 1, "class": 2}]},
        {"columns": {"network": 3}},
        {"settings": {"labels": "known"}},
        {"sweep": "two"},
        {"truth": 3},
    ],
    ids=str,
)
def test_a_row_that_is_none_is_named_with_its_line(tmp_path, change):
    odd = {key: value for key, value in ({**PLAIN, **change}).items() if value is not ...}
    path = write(tmp_path / "r.jsonl", [PLAIN, odd])
    for use in (experiments.table, experiments.figure, experiments.figures.curve, _record.read):
        with pytest.raises(DataError, match=r"line 2: not a row of an experiment's record: "):
            use(path)
    with pytest.raises(DataError, match="line 2"), _record.opened(path):
        pass


@pytest.mark.parametrize("column", ["truth", "reconstruction"])
def test_a_picture_that_is_none_is_a_data_error(tmp_path, column):
    path = write(tmp_path / "r.jsonl", [row(), {**row("c, d"), column: "aGVsbG8="}])
    with pytest.raises(DataError, match="picture"):
        experiments.figure(path)


def test_a_record_with_pictures_is_its_owners_alone(tmp_path):
    for private, mode in ((True, 0o600), (False, 0o666)):
        path = tmp_path / f"{private}.jsonl"
        with _record.opened(path, private=private) as record:
            record.append(PLAIN)
        assert path.stat().st_mode & 0o777 == mode & ~_umask()


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.parametrize("text", [b"hello", b'{"a": 1', b"\x00" * 99])
def test_a_file_that_is_no_record_is_not_cut_off(tmp_path, text):
    path = tmp_path / "r.jsonl"
    path.write_bytes(text)
    with pytest.raises(DataError, match="expected rows of a record"), _record.opened(path):
        pass
    assert path.read_bytes() == text


def test_two_writers_are_refused_and_the_lock_ends_with_the_first(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "r.jsonl"
    for fresh in (False, True):
        with _record.opened(path) as first:
            with pytest.raises(DataError, match="another process"), _record.opened(path, fresh=fresh):
                pass
            first.append(PLAIN)
    assert _record.read(path) == [PLAIN, PLAIN]


def test_a_record_that_was_put_aside_before_the_lock_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    path = write(tmp_path / "r.jsonl", [PLAIN])
    with path.open("rb") as before:
        assert files.lock(before, path)
        path.rename(tmp_path / "r.jsonl.old")
        write(path, [])
        assert not files.lock(before, path)


def test_fresh_keeps_the_old_record(tmp_path):
    path = write(tmp_path / "r.jsonl", [PLAIN])
    for k in range(2):
        with _record.opened(path, fresh=True) as record:
            assert record.rows == []
            record.append({**PLAIN, "image": 5 + k})
    with _record.opened(path, fresh=True):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"r.jsonl.old{n}" for n in ("", ".2", ".3")]
    assert [_record.read(tmp_path / f"r.jsonl.old{n}")[0]["image"] for n in ("", ".2", ".3")] == [0, 5, 6]


def test_a_record_that_cannot_be_opened_is_a_data_error(tmp_path):
    for fresh in (False, True):
        with pytest.raises(DataError, match="is a folder"), _record.opened(tmp_path, fresh=fresh):
            pass
        with pytest.raises(DataError, match="is a device"), _record.opened(Path(os.devnull), fresh=fresh):
            pass
    with pytest.raises(DataError, match="is a device"):
        _record.read(os.devnull)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be opened"), _record.opened(tmp_path / "file" / "r.jsonl"):
        pass
    with pytest.raises(DataError, match="cannot be read"):
        _record.read(tmp_path / "none.jsonl")


def test_a_row_that_fails_to_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "r.jsonl", [PLAIN])

    def full(_):
        raise OSError("no space left")

    with _record.opened(path) as record:
        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(DataError, match="no space left"):
            record.append(PLAIN)
        assert record.rows == [PLAIN]
    assert _record.read(path) == [PLAIN]


# What a reconstruction is worth


def test_rank_counts_equals_against_and_nan_as_last():
    assert identification.rank(torch.tensor([0.1, 0.9, 0.3]), 1) == 1
    assert identification.rank(torch.tensor([0.1, 0.9, 0.3]), 0) == 3
    assert identification.rank(torch.tensor([0.5, 0.5, 0.5]), 0) == 3
    assert identification.rank(torch.tensor([0.5, float("nan"), 0.1]), 2) == 2
    assert identification.rank(torch.tensor([0.5, float("nan"), 0.1]), 1) == 3


def test_floors_are_those_of_images_that_anyone_could_show():
    image = torch.zeros(1, 2, 2)
    image[0, 0] = 0.2  # mean 0.1, variance 0.01
    others = torch.stack([image + 0.1, image - 0.1, torch.ones(1, 2, 2)])
    found = identification.floors(image, others[:2], others[[0, 2]])
    assert found["grey"] == pytest.approx(20.0, abs=1e-4)
    assert found["mean"] == float("inf")
    far = float(-10 * (torch.ones(1, 2, 2) - image).square().mean().log10())
    assert found["class"] == pytest.approx((20.0 + far) / 2, abs=1e-4)
    assert identification.floors(image, others[:0], others[:0])["mean"] is None
    assert identification.floors(image, others, others[:0])["class"] is None


def test_a_blurred_image_finds_its_original_by_ssim_and_noise_does_not():
    generator = torch.Generator().manual_seed(0)
    candidates = torch.rand(10, 3, 16, 16, generator=generator)
    image = (0.3 * candidates[7] + 0.3).contiguous()
    scores = identification.by_ssim(image, candidates)
    assert identification.rank(scores, 7) == 1
    assert identification.rank(scores, 0) > 1


def test_features_are_the_input_of_the_last_layer():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    from invlib import UNIT

    look = identification.Features(Net(), UNIT, 4, "net")
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(look(images), images.mean((2, 3)))
    assert look(torch.rand(1, 3, 8, 8)).shape == (1, 3)
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4)
    assert look.similarity(colours[1] * 0.5, colours).tolist() == pytest.approx([0, 1, 0])


def test_pictures_come_back_to_eight_bits():
    for channels in (1, 3):
        images = torch.rand(3, channels, 5, 7, generator=torch.Generator().manual_seed(0))
        back = files.unpng(files.png(images), 3)
        assert back.shape == images.shape
        assert (back - images).abs().max() <= 0.5 / 255 + 1e-6


# Settings in words


def test_settings_are_described_by_value_and_not_by_address():
    a = describe(inverting_gradients(steps=3, objective=objectives.l1))
    assert a == describe(inverting_gradients(steps=3, objective=objectives.l1))
    assert (a[""], a["steps"], a["objective"]) == ("GradientMatching", 3, "l1")
    assert a["priors"] == [[0.1, "total_variation"]]
    assert a["optimizer"]["signed"] is True
    assert a != describe(inverting_gradients(steps=3))
    assert describe(FedAvg(lr=0.1, local_steps=2))["lr"] == 0.1
    assert describe(torch.ones(2)) != describe(torch.zeros(2))
    assert describe(best(steps=3)) == describe(best(steps=3)) != describe(best(steps=4))
    assert describe(best(steps=3, tv=0.5))["tv"] == 0.5
    assert describe(best(steps=3, init="randn")) != describe(best(steps=3))
    with pytest.raises(ConfigError, match="no name"):
        describe(inverting_gradients(loss=lambda a, b: a.sum()))


@functools.cache
def attacks_of(experiment, **asked):
    setup = experiments.Setup(**asked, slug="cifar10")
    return {case.name: case.attack for case in experiments.get(experiment).cases(setup)}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_shipped_records_that_describe_best_as_before_go_on(path):
    """They hold the local variables of the function that `best` was."""
    for row in _record.read(path):
        old, now = row["settings"]["attack"], plan.current(row)
        assert row["key"] == plan.key(row["case"], row["image"], row["settings"])
        if old[""] != "best.<locals>.attack":
            assert now is row
            continue
        asked = {name: row["settings"][name] for name in ("steps", "restarts", "reduced")}
        attack = attacks_of(row["experiment"], **asked)[row["case"]]
        if "shifts" not in old:  # recorded before there were shifted copies
            attack = replace(attack, shifts=0)
        settings = {**row["settings"], "attack": describe(attack, added_later=plan.ADDED_LATER)}
        assert now["key"] == plan.key(row["case"], row["image"], settings)
        assert now | {"key": "", "settings": ""} == row | {"key": "", "settings": ""}
        edited = {**row, "settings": {**row["settings"], "seed": 1}}
        assert plan.current(edited) is edited  # its key is not that of its settings


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_shipped_records_of_published_attacks_go_on(path):
    """Their weight of total variation is not today's default, and the experiments say so."""
    for row in _record.read(path):
        asked = {name: row["settings"][name] for name in ("steps", "restarts", "reduced")}
        attack = attacks_of(row["experiment"], **asked)[row["case"]]
        if row["settings"]["attack"][""] not in ("Best", "best.<locals>.attack"):
            assert row["settings"]["attack"] == describe(attack, added_later=plan.ADDED_LATER)


# Table and figure


def test_table_is_made_of_the_record_alone(tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        [
            row(psnr=(20.0,), paper="18.00 ± 3.33"),
            row("LeNetZhu, l2", psnr=(float("inf"),), ranks=(None,)),
            row(image=1, psnr=(22.0,), ranks=(3,), paper="18.00 ± 3.33"),
        ],
    )
    table = experiments.table(path)
    assert table.caption.startswith("REDUCED FORM of table1: ")
    assert "1 to 2 clients a case, from patches32 (train), 5 network evaluations a restart" in table.caption
    assert "out of 60 candidates" in table.caption
    expected = (
        "network   attack  PSNR in dB    paper         SSIM   by SSIM  by features  grey   mean   class  "
        "evaluations  clients\n"
        "--------  ------  ------------  ------------  -----  -------  -----------  -----  -----  -----  "
        "-----------  -------\n"
        "LeNetZhu  cosine  21.00 ± 1.00  18.00 ± 3.33  0.500  50%      0%           10.00  11.50  –      "
        "7            2\n"
        "LeNetZhu  l2      1 exact                     0.500  –        0%           10.00  11.50  –      "
        "7            1"
    )
    assert str(table).split("\n\n")[1] == expected


def test_the_full_form_is_not_called_reduced(tmp_path):
    table = experiments.table(write(tmp_path / "r.jsonl", [row(reduced=False)]))
    assert table.caption.startswith("table1: ")
    assert "paper" not in table.columns


def test_table_for_notebooks_escapes_its_words(tmp_path):
    text = experiments.table(write(tmp_path / "r.jsonl", [row("<b>, l2")]))._repr_html_()
    assert "<td>&lt;b&gt;</td>" in text
    assert text.count("<tr>") == 2


def test_table_for_notebooks_says_once_what_is_the_same_in_every_row(tmp_path):
    path = write(tmp_path / "r.jsonl", [row(), row("LeNetZhu, l2", psnr=(30.0,))])
    text = experiments.table(path)._repr_html_()
    assert "In every row: network LeNetZhu, SSIM 0.500" in text
    assert "<th>network</th>" not in text
    assert "<th>attack</th><th>PSNR in dB</th>" in text


def test_inferred_labels_are_counted(tmp_path):
    one = row(psnr=(20.0, 21.0), ranks=(1, 1), labels_right=1)
    one["settings"]["labels"] = "inferred"
    table = experiments.table(write(tmp_path / "r.jsonl", [one]))
    assert table.rows[0][table.columns.index("labels right")] == "50%"


def test_names_and_records_that_do_not_exist(tmp_path):
    with pytest.raises(UnknownNameError, match="table1"):
        experiments.get("table7")
    with pytest.raises(DataError, match="invlib experiment table7"):
        experiments.table("table7")
    with pytest.raises(DataError, match="no rows"):
        experiments.table(write(tmp_path / "r.jsonl", []))
    with pytest.raises(ConfigError, match="columns"):
        experiments.figure(write(tmp_path / "r.jsonl", [row()]), columns=0)
    with pytest.raises(DataError, match=r"no rows"):
        experiments.figure(write(tmp_path / "r.jsonl", []))


def test_figure_shows_original_and_cases(tmp_path):
    rows = [row(), row("LeNetZhu, l2", psnr=(float("inf"),), truth=None), row(image=1)]
    figure = experiments.figure(write(tmp_path / "r.jsonl", rows))
    axes = [a for a in figure.axes if a.images]
    assert len(axes) == 2 + 2 + 1  # l2 has no second image
    assert {a.get_xlabel() for a in axes} == {"", "20.0 dB", "exact"}
    assert axes[0].images[0].get_array()[0, 0, 0] == pytest.approx(0.8, abs=1e-2)
    assert [t.get_text() for a in figure.axes for t in a.texts] == ["original", "cosine", "l2"]


def test_figure_of_a_sweep_has_its_curve_and_floor(tmp_path):
    rows = [
        row(f"ConvNet8, {n}", psnr=(p,) * n, ranks=(1,) * n, sweep=n, series="ConvNet8", experiment="multi")
        for n, p in ((1, 30.0), (2, 20.0))
    ]
    figure = experiments.figure(write(tmp_path / "r.jsonl", rows))
    curve = next(a for a in figure.axes if a.get_ylabel() == "PSNR in dB")
    assert curve.get_xlabel() == "images in the gradient"
    assert [list(line.get_ydata()) for line in curve.lines] == [[30.0, 20.0], [10.0, 10.0]]
    bare = [{**r, "truth": None, "reconstruction": None} for r in rows]
    alone = experiments.curve(write(tmp_path / "bare.jsonl", bare)).axes[0]
    assert [list(line.get_ydata()) for line in alone.lines] == [[30.0, 20.0], [10.0, 10.0]]
    pictures = experiments.figure(tmp_path / "r.jsonl", curve=False)
    assert not [a for a in pictures.axes if a.get_ylabel()]
    with pytest.raises(DataError, match="sweeps 0 settings"):
        experiments.curve(write(tmp_path / "plain.jsonl", [row()]))


def test_a_figure_of_many_cases_fits_on_a_sheet(tmp_path):
    rows = [row(f"LeNetZhu, case {k}", truth=None if k else row()["truth"]) for k in range(12)]
    width, height = experiments.figure(write(tmp_path / "r.jsonl", rows)).get_size_inches()
    assert height <= 6.81
    assert width <= 7


def test_every_experiment_has_cases_with_different_names_in_both_forms():
    for name, experiment in experiments.EXPERIMENTS.items():
        for reduced in (True, False):
            setup = experiments.Setup(steps=8, restarts=1, reduced=reduced, slug="cifar10")
            cases = experiment.cases(setup)
            assert len({case.name for case in cases}) == len(cases), name
            assert len({json.dumps(describe(c.attack)) + c.name for c in cases}) == len(cases)
            assert len({tuple(case.columns) for case in cases}) == 1, name


def test_the_table_of_the_paper_is_beside_ours():
    setup = experiments.Setup(steps=8, restarts=1, reduced=False, slug="cifar10")
    papers = {case.name: case.paper for case in experiments.get("table1").cases(setup)}
    assert papers["LeNetZhu, untrained, l2 + L-BFGS"] == "46.25 ± 12.66"
    assert papers["ResNet20-4, trained, cosine + signed Adam"] == "13.95 ± 3.38"
    reduced = experiments.get("table1").cases(
        experiments.Setup(steps=8, restarts=1, reduced=True, slug="cifar10")
    )
    assert {c.paper for c in reduced if c.network == "ResNet20"} >= {"10.29 ± 5.38 (ResNet20-4)"}
