"""What a user is told of pods, from pods as the Kubernetes API describes them."""

import pytest
from kubernetes import client as k

from dpo.nodes.diagnosis import diagnose


def pod(name="job-node-0-0", phase="Running", container=None, reason=None, conditions=()):
    statuses = []
    if container:
        statuses = [
            k.V1ContainerStatus(
                name="node", image="i", image_id="", ready=False, restart_count=0, state=container
            )
        ]
    return k.V1Pod(
        metadata=k.V1ObjectMeta(name=name),
        spec=k.V1PodSpec(
            containers=[
                k.V1Container(
                    name="node", resources=k.V1ResourceRequirements(limits={"memory": "32Gi"})
                )
            ]
        ),
        status=k.V1PodStatus(
            phase=phase, reason=reason, container_statuses=statuses, conditions=list(conditions)
        ),
    )


def waiting(reason, message=None):
    return k.V1ContainerState(waiting=k.V1ContainerStateWaiting(reason=reason, message=message))


def ended(code, reason="Error"):
    return k.V1ContainerState(
        terminated=k.V1ContainerStateTerminated(exit_code=code, reason=reason)
    )


UNSCHEDULABLE = k.V1PodCondition(
    type="PodScheduled",
    status="False",
    reason="Unschedulable",
    message="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
)


@pytest.mark.parametrize(
    ("given", "severity", "text"),
    [
        (pod(container=ended(137, "OOMKilled")), "failed", "ran out of memory (limit 32Gi)"),
        (pod(container=ended(1)), "failed", "ended with exit code 1"),
        (pod(container=ended(75)), "failed", "was told to end: its pod was deleted, or its"),
        (pod(container=waiting("ImagePullBackOff", "not found")), "image", "cannot be pulled"),
        (
            pod(container=waiting("CreateContainerConfigError", 'secret "store" not found')),
            "image",
            'secret "store" not found',
        ),
        (pod(phase="Pending", conditions=[UNSCHEDULABLE]), "waiting", "Insufficient nvidia.com"),
        (pod(phase="Failed", reason="Evicted"), "failed", "was ended: Evicted"),
    ],
)
def test_each_trouble_has_its_words(given, severity, text):
    finding = diagnose([given])
    assert finding.severity == severity
    assert text in finding.found
    assert "job-node-0-0" in finding.found
    assert finding.fix


def test_pods_that_run_have_no_trouble():
    assert diagnose([pod(), pod("job-node-0-1")]) is None
    assert diagnose([]) is None


def test_the_failure_comes_before_what_followed_from_it():
    stopped, failed = pod("a", container=ended(75)), pod("b", container=ended(1))
    finding = diagnose([stopped, failed])
    assert finding.pod == "b"
    assert not finding.stopped
    assert diagnose([stopped]).stopped


def test_a_container_that_was_restarted_in_place_has_failed():
    again = pod(container=k.V1ContainerState(running=k.V1ContainerStateRunning()))
    again.status.container_statuses[0].last_state = ended(1)
    assert diagnose([again]).severity == "failed"
