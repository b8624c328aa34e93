"""The budgets of the design, one scaffold in all training scripts, and commands that parse."""

import argparse
import ast
import importlib
import re
import shlex

import pytest
from conftest import METHODS, ROOT
from torch import nn

LINES = {"models.py": 740, "diffusion.py": 520, "sample.py": 240, "fid.py": 480}  # at most
LINES |= {f"{name}.py": 570 if name == "train_sra" else 760 for name in METHODS}
SCRIPTS = [f"{name}.py" for name in METHODS]
ALL = "ema_decay 0.9999 ema_warmup False flip False label_drop 0.1 lr 0.0001 warmup 0"
FLOW = f"{ALL} batch_size 256 clip_grad 1.0 diffusion flow steps 400000"
EDM = f"{ALL} clip_grad 0.0 diffusion edm"
PAPERS = {  # the papers' settings: what the scripts do without flags
    "train_sra": f"{FLOW} qk_norm False time_gap 0.2 align_distance smooth-l1 align_decay None",
    "train_mdt": f"{EDM} batch_size 1024 mask_ratio 0.5 mae_weight 0.1 mask_schedule constant",
    "train_discriminative": f"{EDM} batch_size 256 mask_ratio 0.2 summary none prototypes 8192",
    "train_selftranscendence": f"{FLOW} qk_norm True align_weight 0.5 feature_guidance 30.0",
    "train_diversedit": f"{FLOW} qk_norm False long_residual pre pair_layers 10 align_weight 0.0",
}
IN_COMMANDS = {  # script: flags of its paper-scale commands, in their order
    "train_sra": ["SiT-XL/2 None 400000", "SiT-XL/2 None 400000", "DiT-XL/2 0.2 400000"],
    "train_discriminative": ["DiT-XL/2 0.1 2400000"] * 2,
}
EVERY = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")])


def functions(text):
    """Every function, as (name, lines)."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in nodes]


def scaffold(text):
    """A script without docstring, method block (with DEFAULTS) and the name of its method."""
    text = re.sub(r'\A""".*?"""\n', "", text, flags=re.S)
    text, blocks = re.subn(r"^# --- method.*?^# --- end method.*?\n", "", text, flags=re.S | re.M)
    text, calls = re.subn(r"^    main\(\w+, parse_args\(\)\)$", "    main()", text, flags=re.M)
    assert blocks == calls == 1
    return text.strip()


@pytest.mark.parametrize("name", LINES)
def test_a_script_is_within_its_budget(name):
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= LINES[name]
    assert len(ast.get_docstring(ast.parse(text)).splitlines()) <= 40
    assert not re.findall(r"^(?:from|import) (?:train_\w+|sample|fid)\b", text, flags=re.M)


def test_tests_and_tools_are_within_theirs():
    lines = {"tests": 0, "tools": 0}
    for path in ROOT.glob("tests/**/*.py"):
        is_test = path.name.startswith(("test_", "conftest"))
        lines["tests" if is_test else "tools"] += len(path.read_text().splitlines())
    assert lines["tests"] <= 4500 and lines["tools"] <= 2200, lines


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short(path):
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert not [(name, n) for name, n in functions(text) if n > 60 and name != "main"]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_240
    prose = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    lines = [line for line in prose.splitlines() if not line.startswith(("    ", "|"))]
    items = re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", "\n".join(lines))
    assert not [item[:60] for item in items if len(item) > 400]


def test_the_scaffold_is_the_same_in_every_script():
    first, *others = (scaffold((ROOT / name).read_text()) for name in SCRIPTS)
    assert len(first.splitlines()) <= 400
    assert dict(functions(first))["main"] <= 120
    for name, other in zip(SCRIPTS[1:], others):
        assert other == first, f"{name} and {SCRIPTS[0]} differ outside their method blocks"


@pytest.mark.parametrize("script", METHODS)
def test_the_scaffold_names_nothing_of_a_method(script):
    """Flags of one word, such as --head or --pairs, count as flags and as attributes alone."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(script).method_arguments(parser)
    text = scaffold((ROOT / f"{script}.py").read_text())
    for action in parser._actions:
        name = action.dest
        pattern = rf"\b{name}\b" if "_" in name else rf"args\.{name}\b|method\.{name}\b"
        assert not re.search(pattern, text), name
        assert action.option_strings[0] not in text
    used = set(re.findall(r"\bmethod\.(\w+)", text)) - set(dir(nn.Module()))
    assert used == {"model", "ema", "step", "after_step"}


def commands(text):
    """(script, arguments) of every command of one of the scripts, in lines of their own."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        command = re.match(r"\s*(?:pip .*&& *)?((?:python|torchrun) .*)", line)
        for part in command[1].split("&&") if command else ():
            words = shlex.split(part, comments=True)
            scripts = [k for k, word in enumerate(words) if word in LINES]
            if scripts:
                found.append((words[scripts[0]], words[scripts[0] + 1 :]))
    return found


@pytest.mark.parametrize("name", [*SCRIPTS, "sample.py", "README.md"])
def test_every_command_parses(name, monkeypatch):
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    found = commands(text)
    assert len(found) >= 3
    for script, arguments in found:
        monkeypatch.setattr("sys.argv", [script])
        importlib.import_module(script.removesuffix(".py")).parse_args(arguments)


@pytest.mark.parametrize("script", METHODS)
def test_defaults_and_commands_are_the_papers(script, monkeypatch):
    monkeypatch.setattr("sys.argv", [script])
    module = importlib.import_module(script)
    words = PAPERS[script].split()
    defaults = vars(module.parse_args([]))
    assert {k: str(defaults[k]) for k in words[::2]} == dict(zip(words[::2], words[1::2]))
    at_scale = [arguments for _, arguments in commands(module.__doc__) if "--vae" in arguments]
    parsed = [module.parse_args(arguments) for arguments in at_scale]
    shown = [f"{a.model} {a.align_weight} {a.steps}" for a in parsed if hasattr(a, "align_weight")]
    assert shown == IN_COMMANDS.get(script, shown) and all(a.image_size == 256 for a in parsed)
    if script == "train_mdt":
        tuning = next(a for a in parsed if a.init_from)
        assert (tuning.lr, tuning.batch_size, tuning.precision) == (5e-5, 512, "fp32")
        assert (tuning.mask_ratio, tuning.steps) == (0, 100_000)
