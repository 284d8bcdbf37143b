"""What is installed, from records alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vistune.doctor import packages
from vistune.doctor.requirements import Requirement, fits, is_early, own, parse, release

ASKED = [
    Requirement("torch", ">=2.11,<2.14"),
    Requirement("pillow", ">=11,<13"),
    Requirement("bitsandbytes", ">=0.48", "quant"),
]
GOOD = {"torch": ["2.13.0+cpu"], "pillow": ["12.1.0"]}


@pytest.mark.parametrize(
    "wanted", [">=2.11,<2.14", "==2.11.*", "~=2.11.1", "!=2.12.0", ">2.11", "<=2.13", "==2.13", ">=5,<6"]
)
@pytest.mark.parametrize(
    "version", ["2.10.9", "2.11", "2.11.0", "2.11.2", "2.12.0", "2.13", "2.13.1", "2.14.0", "5.17.1"]
)
def test_ranges_are_read_as_pip_reads_them(version: str, wanted: str):
    assert fits(version, wanted) == SpecifierSet(wanted).contains(version)


def test_a_build_and_its_mark_do_not_count():
    assert fits("2.11.0a0+git1234.nv25.11", ">=2.11,<2.14") and fits("2.13.0+das.opt1.dtk2604", "==2.13")
    assert release("2.11.0a0+x") == (2, 11, 0) and release("nonsense") == ()
    assert (
        is_early("2.11.0a0+nv")
        and is_early("2.11.0.dev20260101")
        and is_early("2.11.0rc1")
        and not is_early("2.11.0+cpu")
    )


def test_requirements_are_parsed():
    assert parse("torch==2.9.0") == Requirement("torch", "==2.9.0")
    assert parse("Foo_Bar[x] (>=1.0, <2)") == Requirement("foo-bar", ">=1.0,<2")
    assert parse("bitsandbytes>=0.48; extra == 'quant'") == Requirement("bitsandbytes", ">=0.48", "quant")
    assert parse("tomli>=1; python_version < '3.11'") is None


def test_our_own_requirements_are_known():
    asked = {one.name: one for one in own()}
    assert asked["torch"].wanted and not asked["torch"].extra and asked["bitsandbytes"].extra == "quant"


def test_all_is_there():
    assert [one.level for one in packages.ranges(ASKED, GOOD)] == ["ok"]


def test_what_is_absent_is_installed_in_one_line():
    found = packages.ranges(ASKED, {})
    assert [one.level for one in found] == ["problem"]
    assert found[0].fix == "pip install 'torch>=2.11,<2.14' 'pillow>=11,<13'"


def test_out_of_the_tested_range():
    found = packages.ranges(ASKED, GOOD | {"pillow": ["13.0.0"], "bitsandbytes": ["0.41"]})
    assert [(one.title, one.level) for one in found if one.level != "ok"] == [
        ("pillow", "warning"),
        ("bitsandbytes", "warning"),
    ]


VENDORS = {"torch": ["2.10.0+das.opt1.dtk2604"], "pillow": ["12.1.0"]}


def test_a_vendors_torch_is_kept():
    warned = next(one for one in packages.ranges(ASKED, VENDORS) if one.title == "torch")
    assert "vendor's build" in warned.found and warned.fix.startswith("keep it")
    found = packages.vendor(VENDORS)
    assert "VENV_FLAGS=--system-site-packages TORCH=torch==2.10.0+das.opt1.dtk2604" in found[0].fix
    assert "--constraint torch.txt" in packages.ranges(ASKED, {"torch": ["2.11.0+das"]})[-1].fix
    assert "--no-deps" in packages.vendor({"torch": ["2.11.0a0+nv25.11"]})[0].fix


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.11.0+cu128", "2.12.1+rocm6.4", "2.12.0+xpu", ""])
def test_torchs_own_builds_are_nobody_elses(version: str):
    assert packages.vendor({"torch": [version]}) == []


def record(folder: Path, name: str, version: str) -> None:
    made = folder / f"{name}-{version}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_installed_twice_and_removed_by_half(tmp_path: Path):
    for place, name, version in (
        ("a", "Pillow", "12.0"),
        ("b", "pillow", "11.0"),
        ("a", "rich", "14.0"),
        ("b", "rich", "14.0"),
    ):
        record(tmp_path / place, name, version)
    (tmp_path / "b/~ympy").mkdir()
    found = packages.gather([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "none")])
    assert found.versions == {"pillow": ["12.0", "11.0"], "rich": ["14.0", "14.0"]}
    said = {one.title: one for one in packages.doubles(found)}
    assert set(said) == {"pillow", "rests of packages"}
    assert f"12.0 in {tmp_path}/a" in said["pillow"].found and "~ympy" in said["rests of packages"].found


def test_a_torchvision_of_another_torch():
    beside = {"torchvision": [Requirement("torch", "==2.9.0"), Requirement("numpy", "")]}
    versions = {"torch": ["2.13.0+cpu"], "torchvision": ["0.24.0"]}
    found = packages.pairs(beside, versions)
    assert found[0].title == "torchvision" and "was built for torch==2.9.0" in found[0].found
    assert packages.pairs(beside, versions | {"torch": ["2.9.0+cu128"]}) == []


def test_packages_without_a_record():
    assert packages.unnamed(set()) == []
    assert "numpy, torch" in packages.unnamed({"torch", "numpy"})[0].found
