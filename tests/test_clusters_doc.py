"""The manifest in docs/clusters.md is one Kubernetes could take, and what it runs is a command of ours."""

import re
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from cabochon.cli import app
from cabochon.cli_stages import load_recipe
from cabochon.rollouts.ray_session import check_placement

DOC = Path(__file__).parent.parent / "docs" / "clusters.md"


def manifest():
    [text] = re.findall(r"```yaml\n(.*?)```", DOC.read_text(), re.DOTALL)
    return yaml.safe_load(text)


def test_the_job_s_command_is_one_and_its_recipe_resolves():
    job = manifest()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, command, *parts = shlex.split(job["spec"]["entrypoint"])
    assert program == "cabochon"
    helped = CliRunner().invoke(app, [command, "--help"])
    assert helped.exit_code == 0, helped.output
    cfg = load_recipe(parts)
    assert cfg.stage == command
    assert cfg.model.address.startswith("/shared/")


def test_its_workers_can_be_placed_on_its_nodes():
    spec = manifest()["spec"]
    cfg = load_recipe(shlex.split(spec["entrypoint"])[2:])
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert '\\"TPU\\": 4' in group["rayStartParams"]["resources"]
    node = {"CPU": float(limits["cpu"]), "TPU": float(limits["google.com/tpu"])}
    check_placement(cfg.engine.ray, [node] * group["replicas"])
    assert cfg.engine.ray.resources["TPU"] == cfg.engine.tensor, "an engine gets the chips it spreads over"


def test_every_command_line_of_the_page_is_a_command():
    lines = re.findall(r"^    cabochon (\w+)", DOC.read_text(), re.MULTILINE)
    assert set(lines) == {"plan", "submit"}
    for command in lines:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
