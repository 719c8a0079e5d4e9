"""The command line: instant help, one-line errors, exit codes, and what each command calls."""

import errno
import json
import subprocess
import sys
import types

import pytest
import yaml

from megatron_deft import __version__
from megatron_deft.cli import main
from megatron_deft.config import load_config
from megatron_deft.errors import UserError

COMMANDS = (
    ["objectives"], ["prepare", "math"], ["prepare", "medical"], ["prepare", "figfont"],
    ["prepare", "chat"], ["prepare", "pretrain"], ["inspect", "data"], ["tiny"], ["train"],
    ["convert", "import"], ["convert", "export"], ["convert", "verify"], ["convert", "inspect"],
    ["evaluate", "figfont"],
    ["bench", "loss"], ["bench", "head"], ["bench", "convert"], ["doctor"],
)  # fmt: skip
HEAVY = ("torch", "megatron", "transformers", "numpy", "pyarrow")


def stub(monkeypatch, module: str, name: str, call) -> None:
    """Put a stand-in for one library function in place."""
    fake = types.ModuleType(module)
    setattr(fake, name, call)
    monkeypatch.setitem(sys.modules, module, fake)


def failure(capsys, *argv: str) -> str:
    """The one line a mistaken command prints."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megatron-deft: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def weights(tmp_path):
    """A weights folder as far as the command line looks into it."""
    from megatron_deft.checkpoint_folder import write_manifest
    from megatron_deft.models.families import spec_from_hf

    spec = spec_from_hf(
        {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 512, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        }
    )  # fmt: skip
    folder = tmp_path / "weights"
    folder.mkdir()
    write_manifest(folder, kind="weights", spec=spec.to_json())
    return folder


@pytest.fixture
def run_yaml(tmp_path, weights):
    path, data = tmp_path / "run.yaml", tmp_path / "train.jsonl"
    data.write_text('{"extra_info": {"question": "1 + 1?", "answer": "2"}}\n')
    content = {
        "run_dir": str(tmp_path / "run"),
        "model": {"load": str(weights)},
        "data": {"train_files": [str(data)]},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


# Help


def test_help_is_instant_because_nothing_heavy_is_imported():
    code = (
        "import sys\n"
        "from megatron_deft.cli import main\n"
        f"for command in ([], *{COMMANDS!r}):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, command\n"
        "main(['objectives']); main(['train', '--help-config'])\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  megatron-deft {' '.join(command)}" in text
    description = text.split("\n\n")[1]
    assert len(description) > 60
    assert description.rstrip().endswith(".")


def test_the_examples_parse(capsys):
    from megatron_deft import cli

    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        for example in capsys.readouterr().out.split("example:\n")[1].splitlines():
            name, *words = example.split()
            assert name == "megatron-deft"
            assert callable(cli._parse(words).call)


def test_version_and_module(capsys):
    result = subprocess.run(
        [sys.executable, "-m", "megatron_deft", "--version"], capture_output=True, text=True
    )
    assert result.stdout == f"megatron-deft {__version__}\n"
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--nonsense"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_objectives_and_help_config(capsys):
    assert main(["objectives"]) == 0
    assert "deft" in capsys.readouterr().out
    assert main(["train", "--help-config"]) == 0
    assert "lr: 1.0e-05" in capsys.readouterr().out


# Errors


def raising(error: BaseException):
    def call(*args, **keys):
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a mistake"), 2, "a mistake"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/d/f"),
            2,
            "/d/f: No space left on device",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/d"), 2, "/d: Permission denied"),
        (OSError("Can't load\n  the tokenizer"), 2, "Can't load the tokenizer"),
    ],
)
def test_mistakes_are_one_line_and_code_2(monkeypatch, capsys, error, code, line):
    stub(monkeypatch, "megatron_deft.objectives", "describe", raising(error))
    assert failure(capsys, "objectives") == f"megatron-deft: error: {line}\n"
    for argv in (["--traceback", "objectives"], ["objectives", "--traceback"]):
        assert main(argv) == code
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err
        assert err.endswith(f"megatron-deft: error: {line}\n")


def test_an_interrupt_is_130_and_silent(monkeypatch, capsys):
    stub(monkeypatch, "megatron_deft.objectives", "describe", raising(KeyboardInterrupt()))
    assert main(["objectives"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_dressed_as_a_mistake(monkeypatch):
    stub(monkeypatch, "megatron_deft.objectives", "describe", raising(KeyError("bug")))
    with pytest.raises(KeyError):
        main(["objectives"])


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m megatron_deft train --help-config | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("# Every key")
    assert result.stderr == ""


# Train


def test_dry_run_prints_the_resolved_configuration(run_yaml, capsys, tmp_path):
    argv = ["train", run_yaml, "optim.lr=2e-5", "--dry-run", "train.global_batch=32", "seed=7"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    (tmp_path / "resolved.yaml").write_text(text)
    expected = load_config(run_yaml, ["optim.lr=2e-5", "train.global_batch=32", "seed=7"])
    assert load_config(tmp_path / "resolved.yaml") == expected
    assert "# 32 micro-batches per step" in text
    assert not (tmp_path / "run").exists()


def test_dry_run_looks_at_the_data(run_yaml, capsys, tmp_path):
    for data, message in (
        ("train_files=[absent.jsonl]", "absent.jsonl: no such file"),
        ("prompt_key=prompt", "no column prompt, it has extra_info"),
        ("train_sets=[absent]", "data.train_sets and data.train_files are both set"),
        ("val_sets=[absent]", "absent.bin: no such file"),
    ):
        assert message in failure(capsys, "train", run_yaml, f"data.{data}", "data.format=columns",
                                  "--dry-run")  # fmt: skip


def test_dry_run_of_many_processes(run_yaml, capsys):
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "train.micro_batch=4"]
    argv = ["train", run_yaml, *layout, "--dry-run", "--nproc-per-node", "8"]
    assert main([*argv]) == 0
    assert "# 8 processes, 2 of them data parallel\n# 32 micro-batches" in capsys.readouterr().out
    several = ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:29500"]
    assert main([*argv, *several]) == 0
    assert "# 16 processes, 4 of them data parallel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optim.lrr=1"], "Did you mean optim.lr?"),
        (["objective=defft"], "unknown objective 'defft'"),
        (["parallel.tensor=4", "--nproc-per-node", "4"], "2 key-value heads"),
        (["--nproc-per-node", "3"], "train.global_batch=256"),
        (["--nnodes", "2"], "--rdzv-endpoint"),
        (["model.load=Qwen/Qwen2.5-1.5B"], "convert import"),
        (["optim.cpu_offload=1.5"], "optim.cpu_offload=1.5: must be in [0, 1]"),
        (["optim.cpu_offload=1", "parallel.distributed_optimizer=false"], "or cpu_offload to 0"),
    ],
)
def test_train_refuses_before_anything_starts(run_yaml, capsys, monkeypatch, arguments, expected):
    monkeypatch.setattr("megatron_deft.training.run.run", raising(AssertionError("started")))
    assert expected in failure(capsys, "train", run_yaml, *arguments)


def test_train_without_a_file_or_with_strange_arguments(run_yaml, capsys):
    assert "needs a configuration file" in failure(capsys, "train")
    assert "expected key=value" in failure(capsys, "train", run_yaml, "word")
    with pytest.raises(SystemExit) as ended:
        main(["train", run_yaml, "--optim.lr", "3"])
    assert ended.value.code == 2


def test_a_hugging_face_folder_as_weights_is_told_where_it_belongs(run_yaml, capsys, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    line = failure(capsys, "train", run_yaml, f"model.load={tmp_path / 'hf'}")
    assert f"is a Hugging Face folder: set model.hf={tmp_path / 'hf'}, or run" in line
    assert "megatron-deft convert import" in line


def test_one_process_trains_here(run_yaml, monkeypatch):
    seen = []
    monkeypatch.setattr("megatron_deft.training.run.run", seen.append)
    assert main(["train", run_yaml, "seed=7", "--nproc-per-node", "1"]) == 0
    assert seen == [load_config(run_yaml, ["seed=7"])]


def test_several_processes_are_launched(run_yaml, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "megatron_deft.cli.launch",
        lambda command, nodes: seen.append((command, nodes.world_size)) or 2,
    )
    assert main(["train", run_yaml, "--nproc-per-node", "2", "seed=7", "--resume"]) == 2
    command = ["-m", "megatron_deft", "train", run_yaml, "seed=7", "train.resume=must"]
    assert seen == [(command, 2)]


def test_resume_is_an_override(run_yaml, capsys):
    assert main(["train", run_yaml, "--resume", "--dry-run"]) == 0
    assert "resume: must" in capsys.readouterr().out


def test_under_torchrun_it_is_one_rank(run_yaml, monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr("megatron_deft.training.run.run", seen.append)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", run_yaml, "train.global_batch=3"]) == 0
    assert seen == [load_config(run_yaml, ["train.global_batch=3"])]
    assert "drop --nproc-per-node" in failure(capsys, "train", run_yaml, "--nproc-per-node", "2")
    # 3 data-parallel ranks cannot share 256 samples; rank 0 says so, the others to their agent
    assert "train.global_batch=256" in failure(capsys, "train", run_yaml)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["train", run_yaml]) == 2
    assert capsys.readouterr() == ("", "")
    assert "train.global_batch=256" in (tmp_path / "error.json").read_text()


def test_a_mistake_in_two_ranks_is_one_line(run_yaml, tmp_path):
    """Whole: this command, the agent, and training.run in two ranks."""
    argv = ["train", run_yaml, "--nproc-per-node", "2", "train.global_batch=2"]
    result = subprocess.run(
        [sys.executable, "-m", "megatron_deft", *argv], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 2, result.stderr
    mistakes = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(mistakes) == 1, result.stderr
    assert mistakes[0].startswith("megatron-deft: error: ")
    assert "exitcode" not in result.stderr
    assert "Traceback" not in result.stderr


# The other commands


def test_prepare_figfont(monkeypatch, capsys):
    seen = {}

    def prepare_figfont(out, **keys):
        seen.update(keys, out=out)
        return {"rows": {"train": 10, "test": 2}, "kind": "other"}

    stub(monkeypatch, "megatron_deft.data.prepare.figfont", "prepare_figfont", prepare_figfont)
    options = ["--train-size", "10", "--fonts", "standard,big", "--overwrite"]
    assert main(["prepare", "figfont", "data/f", *options]) == 0
    assert seen == {
        "out": "data/f", "train_size": 10, "test_size": None, "min_word_len": 2,
        "max_word_len": 5, "fonts": ["standard", "big"], "seed": 42, "overwrite": True,
    }  # fmt: skip
    assert capsys.readouterr().out == "data/f: 10 train, 2 test (other)\n"


def test_tiny_makes_a_model_from_a_corpus(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoConfig

    rows = [{"messages": [{"role": "user", "content": f"hello word {n}"}]} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    argv = ["tiny", str(tmp_path / "hf"), "--corpus", str(tmp_path / "c.parquet"), "--layers", "1"]
    assert main([*argv, "--vocab-size", "300"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "hf").num_hidden_layers == 1
    capsys.readouterr()
    assert "exists already" in failure(capsys, *argv)
    assert "no text" in failure(capsys, *argv, "--overwrite", "--column", "text")


def test_evaluate_calls(monkeypatch, capsys):
    from megatron_deft.evaluation import run
    from megatron_deft.evaluation.figfont import TASK

    seen = []

    def evaluate(*args, **keys):
        seen.append((args, keys))
        return {"task": "figfont"}

    monkeypatch.setattr(run, "evaluate", evaluate)
    argv = ["a", "b", "--data", "t.parquet", "--names", "base,deft", "--limit", "5", "--json"]
    assert main(["evaluate", "figfont", *argv, "--max-new-tokens", "8"]) == 0
    ((args, keys),) = seen
    choices = run.Choices(limit=5, max_new_tokens=8)
    assert args == (TASK, ["a", "b"], ["t.parquet"], None, choices)
    assert keys == {"names": ["base", "deft"], "workers": None}
    assert json.loads(capsys.readouterr().out) == {"task": "figfont"}


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor_exit_code(monkeypatch, capsys, healthy):
    from megatron_deft import doctor

    found, remedy = ("2", "") if healthy else ("not installed", "pip install torch")
    finding = doctor.Finding("torch", found, remedy, required=True)
    monkeypatch.setattr(doctor, "examine", lambda: [finding])
    assert main(["doctor"]) == (0 if healthy else 1)
    assert ("missing, required" in capsys.readouterr().out) is not healthy
