from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import msgspec

from node.config import NodeConfig
from node.runtime import OneLine, describe, worker_command

EXAMPLE = Path(__file__).parents[2] / "docs" / "node-example.toml"


def test_the_supervisor_loads_no_inference_stack() -> None:
    heavy = ("onnxruntime", "onnx", "sentencepiece", "gguf", "hil", "skyfield", "scipy", "amqtt")
    code = f"import sys, node.runtime; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_worker_command_carries_the_configuration() -> None:
    config = NodeConfig.load(EXAMPLE)
    command = worker_command(config)
    assert command[:3] == [sys.executable, "-m", "node.inference.worker"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options == {
        "--image": str(config.image_dir),
        "--arena": str(config.arena_path),
        "--threads": "2",
        "--epoch-tokens": "32",
        "--seats": "10",
        "--batch": "8",
        "--positions": "4096",
        "--overhead-budget": "0.01",
        "--retries": "6",
        "--epoch-seconds": "2.0",
    }
    worker = msgspec.structs.replace(config.worker, checked=True)
    checked = worker_command(msgspec.structs.replace(config, worker=worker))
    assert checked == [*command, "--checked"]


def fail() -> None:
    raise RuntimeError("first\nsecond")


def test_an_exception_is_told_in_one_line_with_its_place() -> None:
    try:
        fail()
    except RuntimeError as error:
        group = ExceptionGroup("group", [ExceptionGroup("inner", [error])])
        assert describe(group).startswith("RuntimeError: first\nsecond at test_node_supervisor.py:")
        record = logging.LogRecord("n", logging.ERROR, "p", 1, "text %s", ("x",), sys.exc_info())
    line = OneLine("%(levelname)s %(message)s").format(record)
    assert line.startswith("ERROR text x (RuntimeError: first | second at test_node_supervisor.py:")
    assert "\n" not in line
    assert "Traceback" not in line
