"""Run a small federation of two clients with the real Flower, and audit what `record_updates` has saved.

Usage: python -m tests.check_flower

Flower pins so many packages that it gets a new environment of its own, which sees the running one's torch
behind its own packages. With ``--run FOLDER`` it is this environment in which the federation runs: apps,
mods, messages and strategy are Flower's; the two clients run one after another in this process, and not in
processes of Ray, whose start a busy machine misses.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOWER = "flwr==1.42.0"
SECONDS = 600
BUDGET = 60


def main() -> int:
    """Make the environment, run the federation in it, and return its exit status."""
    if sys.argv[1:2] == ["--run"]:
        return run(Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "venv", with_pip=True)
        python = home / "venv" / "bin" / "python"
        begun = time.monotonic()
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", FLOWER]
        if subprocess.run(pip, check=False).returncode:
            print(f"check-flower: {FLOWER} cannot be installed here (see above); nothing was checked")
            return 1
        installed = time.monotonic()
        where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        Path(site, "torch-of-the-running-one.pth").write_text(sysconfig.get_path("purelib") + "\n")
        quiet = {
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_HOME": str(home / "flwr"),
        }
        found = subprocess.run(
            [str(python), "-m", "tests.check_flower", "--run", str(home / "out")],
            cwd=ROOT,
            env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)},
            check=False,
            timeout=SECONDS,
        )
        ran = time.monotonic()
        print(f"check-flower: {installed - begun:.0f} s to install, {ran - installed:.0f} s to run")
        return found.returncode


def network():
    """Make the network of Flower's quickstart for PyTorch."""
    import torch.nn.functional as F
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
            self.pool = nn.MaxPool2d(2, 2)
            self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

        def forward(self, x):
            x = self.pool(F.relu(self.conv1(x)))
            x = self.pool(F.relu(self.conv2(x))).flatten(1)
            return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    return Net()


def run(folder: Path) -> int:
    """Run the federation and raise where a file is missing or is not what the server got."""
    import torch
    import torch.nn.functional as F
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import arrays_size_mod
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity
    from safetensors.torch import load_file, save_file

    import invlib as iv
    from invlib.errors import DoubtWarning
    from invlib.integrations.flower import record_updates

    def halved(message, context, call_next):
        """A mod as those for privacy: it changes what the client sends."""
        reply = call_next(message, context)
        if "arrays" not in reply.content:
            return reply
        before = message.content["arrays"].to_torch_state_dict()
        after = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({n: before[n] + (t - before[n]) / 2 for n, t in after.items()})
        return reply

    recorder = record_updates(network, out=folder / "audit", normalization=iv.CIFAR10, on_error="raise")
    app = ClientApp(mods=[arrays_size_mod, recorder, halved])

    def images_of(part):
        return iv.data.samples("photos32", indices=range(2 * part, 2 * part + 2))

    def train(message: Message, context: Context) -> Message:
        model = network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels = images_of(context.node_config["partition-id"])
        data = torch.utils.data.TensorDataset(iv.CIFAR10.encode(images), labels)
        optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"], momentum=0.9)
        model.train()
        for _ in range(2):
            for inputs, truth in torch.utils.data.DataLoader(data, batch_size=2):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), truth)
                loss.backward()
                optimizer.step()
        metrics = {"train_loss": loss.item(), "num-examples": len(data)}
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
        return Message(content=RecordDict(content), reply_to=message)

    app.train()(train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"eval_loss": 0.0, "num-examples": 1})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    class Server(FedAvg):
        """Flower's own strategy, which keeps what each client has sent."""

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            for reply in replies:
                arrays = reply.content["arrays"].to_torch_state_dict()
                save_file(arrays, folder / f"sent-{reply.metadata.src_node_id}.safetensors")
                assert {*reply.content} == {"arrays", "metrics"}, "something was added to the reply"
            return super().aggregate_train(server_round, replies)

    class Clients(Grid):
        """Two clients, called one after another."""

        run = property(lambda self: None)
        set_run = create_message = push_messages = pull_messages = None

        def get_node_ids(self):
            return [11, 12]

        def send_and_receive(self, messages, *, timeout=None):
            return [app(message, context_of(message.metadata.dst_node_id)) for message in messages]

    def context_of(node):
        where = {"partition-id": node - 11, "num-partitions": 2}
        return Context(run_id=1, node_id=node, node_config=where, state=RecordDict(), run_config={})

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower's processes are told
    folder.mkdir()
    torch.manual_seed(0)
    start = network().state_dict()
    settings = ConfigRecord({"lr": 0.05})
    Server().start(Clients(), initial_arrays=ArrayRecord(start), train_config=settings, num_rounds=1)

    files = sorted(p for p in (folder / "audit").iterdir() if "received" not in p.name)
    assert len(files) == 2, f"{[p.name for p in files]}; expected one observation of each client"
    protocol = iv.FedAvg(lr=0.05, local_steps=2, momentum=0.9)
    parts = set()
    for path in files:
        seen, model = iv.load_observation(path), network()
        model.load_state_dict(load_file(path.with_suffix(".received.safetensors")))
        seen.validate(model)
        sent = load_file(folder / f"sent-{path.stem.rpartition('-')[2]}.safetensors")
        assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items()), "other weights came in"
        assert all(torch.equal(seen.update[n], sent[n] - start[n]) for n in start), "the server got others"
        assert (seen.protocol, seen.num_images, seen.notes) == (protocol, 2, ()), seen
        for part in range(2):
            told = iv.observe(model, *images_of(part), protocol, normalization=iv.CIFAR10)
            if all(torch.allclose(2 * seen.update[n], told.update[n], rtol=1e-2, atol=1e-6) for n in start):
                parts.add(part)
        print(path.name, seen)
    assert parts == {0, 1}, f"the simulated clients {parts} alone send what was recorded; expected both"

    # in the wrong order, called as a client is
    wrong = ClientApp(mods=[halved, recorder])
    wrong.train()(train)
    content = RecordDict(
        {"arrays": ArrayRecord(start), "config": ConfigRecord({"lr": 0.05, "server-round": 2})}
    )
    message = Message(content=content, dst_node_id=11, message_type="train")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrong(message, context_of(11))
    assert any(w.category is DoubtWarning and "halved stands before" in str(w.message) for w in caught), (
        caught
    )

    # a check that fails, here on other images than the client's, keeps the update back
    keeping = record_updates(
        network,
        out=folder / "kept",
        normalization=iv.CIFAR10,
        data=lambda context: iv.data.samples("photos32", indices=range(3)),
        on_leak="withhold",
    )
    kept = ClientApp(mods=[keeping])
    kept.train()(train)
    reply = kept(message, context_of(11))
    back = reply.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(back[n], t) for n, t in start.items()), "the update was sent"
    assert {*reply.content} == {"arrays", "metrics"}, "something was added to the reply"
    print("Flower: two clients, two observations, each what the server got; one update was kept", flush=True)
    return audited(files[0], folder / "report")


def audited(update: Path, out: Path) -> int:
    """Audit what was recorded as its owner would, and look whether the report names what leaks."""
    begun = time.monotonic()
    options = ["--model", "tests.check_flower:network", "--budget", str(BUDGET), "--out", str(out)]
    command = [sys.executable, "-m", "invlib", "audit", str(update), *options]
    if (status := subprocess.run(command, check=False).returncode) != 0:
        return status
    report = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    told = {finding["name"] for finding in report["leaks"] if finding["verdict"] == "read off"}
    assert report["complete"]
    assert "Labels" in told, told
    assert "<html" in (out / "audit.html").read_text(encoding="utf-8")
    print(f"audit: {report['verdict']} in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
