"""What Kubernetes says of pods, in lines for the person who started the run."""

import pytest
from kubernetes.client import (
    V1ContainerState,
    V1ContainerStateTerminated,
    V1ContainerStateWaiting,
    V1ContainerStatus,
    V1ObjectMeta,
    V1Pod,
    V1PodCondition,
    V1PodStatus,
)

from pipelines import events
from pipelines.events import Watcher, advice, step_of


@pytest.mark.parametrize(
    ("node", "step"),
    [
        ("run-x.root.exit-handler-1.exit-handler-1.sft.executor", "sft"),
        ("run-x.root.sft-driver", "sft"),
        ("run-x.root.exit-handler-1(0).preference(0).executor(1)", "preference"),
        ("run-x.root.condition-2.publish.executor", "publish"),
        ("run-x.root.finish-driver", "finish"),
        (
            "run-x.root.exit-handler-1.for-loop-5.iteration-iterations(0:0).iteration-item"
            ".preference.executor",
            "preference",
        ),
        ("run-x.root.exit-handler-1.evaluate-2-driver", "evaluate"),
        ("run-x.root.exit-handler-1.for-loop-3.iteration-item.ingest-shard.executor(0)", "ingest"),
        ("run-x.root.exit-handler-1.select.executor", "select"),
        ("run-x.root.somebody-elses", ""),
        ("", ""),
    ],
)
def test_the_step_behind_a_node(node, step):
    assert step_of(node) == step


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("OOMKilled (exit code 137)", "more (--deploy steps.sft.memory=...)"),
        ('CreateContainerConfigError: secret "store" not found', "store_secret names it"),
        ("couldn't find key accesskey in Secret team/store", "lacks a key"),
        ('pods "x" is forbidden: exceeded quota: team, requested: cpu=4', "quota is used up"),
        ('ErrImagePull: failed to pull "r/train:2": not found', "check its name (--image)"),
        ("ErrImageNeverPull: image is not present with pull policy of Never", "--image"),
        ("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.", "no node has that many free"),
        ("0/1 nodes are available: 1 Insufficient memory.", "no node has what the step asks"),
        (
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
            "node_selector",
        ),
        ("1 node(s) had untolerated taint {nvidia.com/gpu: present}.", "tolerations"),
        ('persistentvolumeclaim "models" not found', "model_cache"),
        ("DeadlineExceeded: Pod was active on the node longer", "timeout_seconds"),
        (
            "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. "
            "preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling.",
            "model_cache",
        ),
        ("pod deleted", "--retry"),
        ("Preempted: Preempted in order to admit critical pod", "--retry"),
        ("Terminated: Pod was terminated in response to imminent node shutdown.", "--retry"),
        # killed, and not for its memory: Kubernetes would say so
        ("Error (exit code 137)", "or its process killed"),
        ("Error (exit code 137)", "--deploy steps.sft.memory=..."),
        ("Error (exit code 130)", "--retry"),
        # what steps of this package said in images of earlier days
        (
            "ImportError: cannot import name 'describe' from 'dpo.storage.step' (/app/step.py)",
            "built from other code",
        ),
        ("ModuleNotFoundError: No module named 'dpo.storage.adopt'", "from one commit"),
    ],
)
def test_what_to_do(words, fix):
    (line,) = advice(words, "sft")
    assert fix in line


def test_nothing_is_made_up_for_words_that_are_not_known():
    assert advice("the loss is NaN", "sft") == []
    assert advice("a request ended with exit code 1370", "sft") == []
    many = "0/1 nodes are available: 1 Too many pods. preemption: 0/1 nodes are available: ..."
    assert advice(many, "sft") == [], "no pod was taken away"


def pod(step, phase, *, waiting=None, ended=None, condition=None, reason=None):
    statuses = []
    if waiting or ended:
        state = V1ContainerState(
            waiting=V1ContainerStateWaiting(reason=waiting[0], message=waiting[1])
            if waiting
            else None,
            terminated=V1ContainerStateTerminated(exit_code=ended[1], reason=ended[0])
            if ended
            else None,
        )
        fields = {"image": "i", "image_id": "", "name": "main", "ready": False, "restart_count": 0}
        statuses = [V1ContainerStatus(**fields, state=state)]
    conditions = [
        V1PodCondition(type="PodScheduled", status="False", message=text)
        for text in filter(None, [condition])
    ]
    return V1Pod(
        metadata=V1ObjectMeta(
            annotations={"workflows.argoproj.io/node-name": f"run.root.{step}.executor"}
        ),
        status=V1PodStatus(
            phase=phase, container_statuses=statuses, conditions=conditions, reason=reason
        ),
    )


@pytest.fixture
def watcher(monkeypatch):
    monkeypatch.setattr(events, "_ASK_SECONDS", 0.0)

    def make(*pods, nodes=None):
        watching = Watcher("run", "team")
        monkeypatch.setattr(watching, "_pods", lambda: list(pods))

        def messages(phase=""):
            yield from events._messages(nodes or {}, phase)

        monkeypatch.setattr(watching, "_node_messages", messages)
        return watching

    return make


def test_a_pod_that_cannot_start_is_told_once(watcher):
    watching = watcher(
        pod("sft", "Pending", waiting=("CreateContainerConfigError", 'secret "s" not found')),
        pod("ingest", "Pending", waiting=("ContainerCreating", None)),
        pod("gate", "Running"),
    )
    (line,) = watching.news()
    assert line.startswith('sft: waiting: CreateContainerConfigError: secret "s" not found\n')
    assert "  fix:   a Secret that the deployment names is missing" in line
    assert list(watching.news()) == []


def test_the_scheduler_and_a_quota_are_heard(watcher):
    nodes = {
        "n": {
            "name": "run.root.preference.executor",
            "type": "Pod",
            "phase": "Pending",
            "message": "pods is forbidden: exceeded quota: team",
        }
    }
    waiting = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    told = list(watcher(pod("sft", "Pending", condition=waiting), nodes=nodes).news())
    assert [line.splitlines()[0] for line in told] == [
        f"sft: waiting: {waiting}",
        "preference: waiting: pods is forbidden: exceeded quota: team",
    ]


def test_reasons_of_an_end(watcher):
    nodes = {
        "a": {
            "name": "run.root.sft.executor",
            "type": "Pod",
            "phase": "Error",
            "message": "pod deleted",
        },
        "b": {
            "name": "run.root.gate.executor",
            "type": "Pod",
            "phase": "Succeeded",
            "message": "x",
        },
    }
    pods = [pod("preference", "Failed", ended=("OOMKilled", 137)), pod("gate", "Succeeded")]
    assert watcher(*pods, nodes=nodes).reasons() == {
        "sft": ["pod deleted"],
        "preference": ["OOMKilled (exit code 137)"],
    }


@pytest.mark.parametrize("text", ["}{", "- a", "kind: Config"])
def test_a_kubeconfig_that_is_none_stops_no_waiting(monkeypatch, tmp_path, text):
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    assert Watcher("run", None).reasons() == {}


def test_nobody_is_asked_where_nothing_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setattr(events, "_ASK_SECONDS", 0.0)
    watching = Watcher("run", None)
    assert list(watching.news()) == []
    assert watching.reasons() == {}
