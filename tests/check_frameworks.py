"""Record what clients of the real Flower, Opacus and FLARE send, and audit what was recorded.

Usage: python -m tests.check_frameworks

They pin so many packages that they get a new environment of their own, which sees the running one's torch
behind its own packages; with ``--run FOLDER`` it is this environment in which the clients run.

Flower's simulation runs whole: its link, nodes, messages, apps, mods and strategy. Only Ray is not there, and
the two clients run one after another in a thread of this process: Ray waits 15 seconds for its agents' ports
and 30 for its node, whatever is set, and of seven starts on two busy cores two missed that.
"""

import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import warnings
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
# What Opacus needs besides torch, and no more: pip would look for torch itself.
WHOLE = ("flwr==1.42.0", "opt-einsum==3.4.0")
ALONE = ("opacus==1.6.0", "nvflare==2.9.0")  # FLARE's filters need none of its other packages
SECONDS = 600
BUDGET = 30
SLACK = 0.02  # between two accountants of the same loss, each of which rounds it up


def main() -> int:
    """Make the environment, run the clients in it, and return its exit status."""
    if sys.argv[1:2] == ["--run"]:
        folder = Path(sys.argv[2])
        folder.mkdir()
        status = flower(folder)
        opacus()
        flare(folder / "flare")
        return status
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        venv.create(home / "venv", with_pip=True)
        python = str(home / "venv" / "bin" / "python")
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        # before pip looks, so that it takes what is there
        Path(site, "torch-of-the-running-one.pth").write_text(sysconfig.get_path("purelib") + "\n")
        begun = time.monotonic()
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for wanted in (WHOLE, ("--no-deps", *ALONE)):
            if subprocess.run([*pip, *wanted], check=False).returncode:
                print(f"check-flower: {', '.join(wanted)} cannot be installed here; nothing was checked")
                return 1
        installed = time.monotonic()
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(home / "flwr")}
        found = subprocess.run(
            [python, "-m", "tests.check_frameworks", "--run", str(home / "out")],
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


def flower(folder: Path) -> int:
    """Simulate two clients and raise where a file is missing or is not what the server got."""
    import torch
    import torch.nn.functional as F
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import arrays_size_mod
    from flwr.server.superlink.fleet.vce.backend import Backend
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
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

    class Inline(Backend):
        """A worker of Flower's simulation that calls the app, where Ray's would send it to a process."""

        num_workers = 1

        def build(self, app_fn):
            self.app = app_fn()

        def is_worker_idle(self):
            return True

        def process_message(self, message, context):
            return self.app(message=message, context=context), context

        def terminate(self):
            pass

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        settings = ConfigRecord({"lr": 0.05})
        Server().start(grid, initial_arrays=ArrayRecord(start), train_config=settings, num_rounds=1)

    torch.manual_seed(0)
    start = network().state_dict()
    worker = ModuleType("flwr.server.superlink.fleet.vce.backend.raybackend")  # which would import Ray
    worker.RayBackend = Inline
    sys.modules[worker.__name__] = worker
    run_simulation(server, app, num_supernodes=2, backend_name="inline")

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

    def context_of(node):
        where = {"partition-id": node - 11, "num-partitions": 2}
        return Context(run_id=1, node_id=node, node_config=where, state=RecordDict(), run_config={})

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


def opacus() -> None:
    """Train a client under differential privacy, and raise where its noise is not what was read off it."""
    import torch
    import torch.nn.functional as F
    from opacus import PrivacyEngine

    import invlib as iv
    from invlib.integrations.opacus import privacy_of

    warnings.filterwarnings("ignore", module="(opacus|torch).*")
    torch.manual_seed(0)
    received, model = network(), network()
    model.load_state_dict(received.state_dict())
    images, labels = iv.data.samples("patches32", range(16))
    data = torch.utils.data.TensorDataset(iv.CIFAR10.encode(images), labels % 10)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.1,
        max_grad_norm=1.5,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with iv.record_client(model, num_images=len(data), normalization=iv.CIFAR10) as seen:
            for inputs, truth in loader:  # each image is drawn by itself
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), truth).backward()
                optimizer.step()
    assert any("gradients of single images" in str(w.message) for w in caught), caught
    update = seen.observation.update
    after = dict(model._module.named_parameters())
    assert {*update} == {*after}, {*update}
    assert all(torch.equal(update[n], after[n] - p) for n, p in received.named_parameters())

    found = privacy_of(optimizer, loader, steps=len(loader))
    assert (found.clip_norm, found.noise_multiplier, found.batch_size) == (1.5, 1.1, 4), found
    assert (found.rate, found.steps) == (0.25, 4), found
    ours = iv.defenses.subsampled_epsilon(
        found.noise_multiplier, 1e-5, rate=found.rate, rounds=found.steps, neighbours="add or remove one"
    )
    theirs = engine.get_epsilon(1e-5)
    assert math.isclose(ours, theirs, rel_tol=SLACK), (ours, theirs)

    # a step with gradients of zero moves by the noise alone
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer.zero_grad()
    (0 * model(inputs)).sum().backward()
    optimizer.step()
    moved = (torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before) / 0.05
    assert math.isclose(moved.std(), found.noise, rel_tol=5 / math.sqrt(2 * len(moved))), moved.std()

    report = iv.audit(received, seen.observation, privacy=found, budget=5, evaluations=1)
    bound = {finding.name: finding for finding in report.defences}["The training's noise"]
    expected = iv.defenses.subsampled_bound(0.01, 1.1, rate=0.25, rounds=4, neighbours="add or remove one")
    assert (bound.verdict, bound.numbers["most successes at kappa 0.01"]) == ("bounded", expected), bound
    print(
        f"Opacus: epsilon {ours:.3f} and, by its own accountant, {theirs:.3f}. {report.summary[2]}",
        flush=True,
    )


def flare(folder: Path) -> None:
    """Run a client's task through FLARE's filters, and raise where the file is not what leaves."""
    import torch
    import torch.nn.functional as F
    from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
    from nvflare.apis.filter import FilterChainType, FilterContextKey
    from nvflare.apis.fl_context import FLContextManager
    from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy

    import invlib as iv
    from invlib.integrations.flare import RecordUpdates

    facts = {"num_images": 2, "image_shape": [3, 32, 32], "normalization": [[0.5], [0.5]]}
    made = ("tests.check_frameworks:network", str(folder), {"lr": 0.05}, facts)
    incoming, outgoing = (RecordUpdates(*made, on_error="raise") for _ in range(2))
    incoming.set_prop(FilterContextKey.CHAIN_TYPE, FilterChainType.TASK_DATA_CHAIN)
    outgoing.set_prop(FilterContextKey.CHAIN_TYPE, FilterChainType.TASK_RESULT_CHAIN)
    manager = FLContextManager(identity_name="site-1", job_id="job")
    torch.manual_seed(0)
    model = network()
    start = {n: t.clone() for n, t in model.state_dict().items()}
    task = DXO(DataKind.WEIGHTS, data={n: t.numpy() for n, t in start.items()}).to_shareable()
    task.set_header("current_round", 0)
    with manager.new_context() as context:
        task = incoming.process(task, context)

    images, labels = iv.data.samples("photos32", range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(2 * images - 1), labels).backward()
        optimizer.step()
    moved = {n: (t - start[n]).numpy() for n, t in model.state_dict().items()}
    result = DXO(DataKind.WEIGHT_DIFF, data=moved, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 3}).to_shareable()
    result.set_header("current_round", 0)
    with manager.new_context() as context:
        filtered = PercentilePrivacy(percentile=10, gamma=1.0).process(result, context)
        before = from_shareable(filtered)
        kept = {n: a.copy() for n, a in before.data.items()}
        leaving = from_shareable(outgoing.process(filtered, context))
        assert not context.get_all_public_props().keys() - {"__run_num__", "__identity_name__"}
    assert leaving.meta == before.meta, "something was added to what is sent"
    seen = iv.load_observation(folder / "round-0000-site-1.safetensors")
    assert seen.protocol == iv.FedAvg(lr=0.05, local_steps=3), seen.protocol
    for name, value in kept.items():
        assert (leaving.data[name] == value).all(), "what is sent was changed"
        assert torch.allclose(seen.update[name], torch.from_numpy(value), atol=1e-7), name
    assert any((kept[n] != moved[n]).any() for n in kept), "the filter before the recorder did nothing"
    print("FLARE: one result, recorded as it left its own filters", flush=True)


def audited(update: Path, out: Path) -> int:
    """Audit what was recorded as its owner would, and look whether the report names what leaks."""
    begun = time.monotonic()
    options = ["--model", "tests.check_frameworks:network", "--budget", str(BUDGET), "--out", str(out)]
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
