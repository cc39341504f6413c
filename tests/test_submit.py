"""A recipe as a job: what is sent is whole, the log arrives, the exit code is the job's; a wrong address is a line."""

import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from ray_head import free_ports, ray_head

from cabochon import submit
from cabochon.cli_stages import load_recipe
from cabochon.errors import MachineError, UserError
from cabochon.overrides import load
from cabochon.pipeline import PipelineConfig
from cabochon.sft.config import SftConfig

RECIPE = """
stage: sft
steps: 2
model: {{scratch: {{vocab_size: 264, dim: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, ffn_dim: 16,
  eos_ids: [260, 258], bos_id: 257, pad_id: 256}}}}
data: {{train: [{place}/rows.jsonl]}}
step: {{batch_size: 2, sequence_length: 32}}
run: {{dir: {place}/run, tensorboard: false, log_every: 1}}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(8)))
    (tmp_path / "mine.yaml").write_text(RECIPE.format(place=tmp_path))
    return tmp_path / "mine.yaml"


def test_what_is_sent_is_the_package_the_recipe_and_its_files(recipe, tmp_path):
    parcel = submit.pack([str(recipe), "step.batch_size=4"], tmp_path / "sent")
    assert parcel.entrypoint == "python -m cabochon sft recipe.yaml"
    assert parcel.stays == ""
    sent = load(SftConfig, [str(tmp_path / "sent" / "recipe.yaml")])
    assert sent.step.batch_size == 4
    [source] = sent.data.train
    assert (tmp_path / "sent" / source.path).read_text() == (tmp_path / "rows.jsonl").read_text()
    assert sent.run.dir == f"{tmp_path}/run", "what is written is not looked for"
    # it runs from what was sent alone
    dry = subprocess.run(
        [sys.executable, "-c", "import cabochon.sft.train, cabochon; print(cabochon.__file__)"],
        cwd=tmp_path / "sent", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert dry.stdout.strip() == str(tmp_path / "sent" / "cabochon" / "__init__.py")


def test_a_run_directory_that_would_vanish_is_told(recipe, tmp_path):
    assert submit.pack([str(recipe), "run.dir=runs/x"], tmp_path / "sent").stays == "runs/x"


def test_the_words_of_a_job_of_stages_are_searched_too(recipe, tmp_path):
    (tmp_path / "job.yaml").write_text(
        f"stage: run\ndir: {tmp_path}/out\nstages:\n"
        f"  one: [sft, {recipe}, 'data.train=[{tmp_path}/rows.jsonl]', 'run.dir={tmp_path}']\n"
        "  two: [rl, demo-rl, 'model.address={dir}/one/final']\n"
    )
    parcel = submit.pack([str(tmp_path / "job.yaml")], tmp_path / "sent")
    assert parcel.entrypoint == "python -m cabochon run recipe.yaml"
    sent = load(PipelineConfig, [str(tmp_path / "sent" / "recipe.yaml")])
    assert sent.stages["one"] == ("sft", "files/0/mine.yaml", "data.train=[files/1/rows.jsonl]", f"run.dir={tmp_path}")
    assert sent.stages["two"] == ("rl", "demo-rl", f"model.address={tmp_path}/out/one/final"), "not there yet"
    assert (tmp_path / "sent/files/1/rows.jsonl").exists()


def test_what_is_too_large_to_send_is_refused_with_a_remedy(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "MOST_BYTES", 10)
    with pytest.raises(UserError, match=r"rows\.jsonl: with it .* put it on a disk the cluster sees"):
        submit.pack([str(recipe)], tmp_path / "sent")


def test_a_recipe_that_is_no_stage(tmp_path):
    assert load_recipe(["tiny-moe"])
    with pytest.raises(UserError, match="stage None is no job: expected a recipe of one of the stages"):
        submit.pack(["tiny-moe"], tmp_path)


class Other(http.server.BaseHTTPRequestHandler):
    """A web server that is something else."""

    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *args):
        pass


def test_an_address_that_is_none_or_another_s():
    with pytest.raises(UserError, match=r"--address head:8265: expected the job server's"):
        submit.connect("head:8265")
    with pytest.raises(MachineError, match="nothing answers there; expected one such as http://head-node:8265"):
        submit.connect(f"http://127.0.0.1:{free_ports(1)[0]}")
    server = http.server.HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(MachineError, match="not Ray's job server"):
            submit.connect(f"http://127.0.0.1:{server.server_port}")
        Other.status = 401
        client = importlib.util.find_spec("aiohttp") is not None  # of the extra `cluster`, which tests do without
        told = (MachineError, "wants a token: set RAY_AUTH_TOKEN") if client else (UserError, "client is not installed")
        with pytest.raises(told[0], match=told[1]):
            submit.connect(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def head():
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("needs Ray's job server: pip install 'cabochon[cluster]'")
    with ray_head(cpus=2, jobs=True) as head:
        yield head


def started(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "cabochon", "submit", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_job_runs_on_the_cluster_and_its_exit_code_comes_back(head, recipe, tmp_path):
    done = started(str(recipe), "--address", head.jobs)
    out, err = done.communicate(timeout=500)
    assert done.returncode == 0, out + err
    assert "python -m cabochon sft recipe.yaml" in err
    assert f"{tmp_path}/run/final" in out, "the job's own last line, by way of its log"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2

    (tmp_path / "rows.jsonl").write_text('{"text": 3}\n')
    failed = started(str(recipe), f"run.dir={tmp_path}/other", "--address", head.jobs)
    out, err = failed.communicate(timeout=500)
    assert failed.returncode == 2, out + err
    assert "rows.jsonl:1" in out, "the job's own error line"


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(head, recipe, tmp_path):
    following = started(str(recipe), f"run.dir={tmp_path}/long", "steps=1000000", "--address", head.jobs)
    first = following.stderr.readline()
    job = first.split()[1].rstrip(":")
    time.sleep(3)
    os.kill(following.pid, signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 130
    assert f"ray job stop {job} --address {head.jobs}" in err
    client = submit.connect(head.jobs)
    assert not client.get_job_info(job).status.is_terminal()
    assert client.stop_job(job)
    assert submit.follow(client, job, lambda text: None) == 1, "a job that was stopped did not succeed"


@pytest.mark.slow
def test_without_waiting_the_job_s_id_is_all(head, recipe):
    quick = started(str(recipe), "--no-wait", "--address", head.jobs)
    out, _ = quick.communicate(timeout=200)
    assert quick.returncode == 0
    client = submit.connect(head.jobs)
    assert submit.follow(client, out.strip(), lambda text: None) == 0
