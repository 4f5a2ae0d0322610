"""The job as Kubernetes wants it: a TrainJob of Kubeflow Trainer v2, or a PyTorchJob.

Both get the same pods, built from the typed models of ``kubeflow-trainer-api``. A TrainJob refers
to a runtime of the cluster and changes it by ``runtimePatches``.
"""

from __future__ import annotations

from typing import Any

from kubeflow_trainer_api import models as m

from dpo.config.nodes import NodeResources, NodesConfig, cache_variables
from dpo.nodes.request import VARIABLE, Request

MANAGER = "dpo.pipeline/launcher"
"""Owner of our runtime patches."""
LABEL = "app.kubernetes.io/managed-by"
_SCRATCH = "scratch"
_SHM = "dshm"
_CACHE = "model-cache"
_PORT = 29500
_COMMAND = ["python3", "-m", "dpo.train.node"]
_PYTORCH_CONTAINER = "pytorch"
"""Name that the training operator asks for."""
_TRAINJOB_CONTAINER = "node"
_NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
"""In a profile of multi-user Kubeflow every pod gets Istio's proxy: nodes do not find each other
through it (kubeflow/trainer#2794), and it does not end with them. Kubeflow's own pods say the same
of themselves."""
_GRACE_SECONDS = 120
"""A pod that is asked to end has this long to write a checkpoint."""


def owner_reference(owner: Any) -> m.IoK8sApimachineryPkgApisMetaV1OwnerReference:
    """Reference to the workflow: the job goes when the run is deleted."""
    return m.IoK8sApimachineryPkgApisMetaV1OwnerReference(
        apiVersion=owner.api_version, kind=owner.kind, name=owner.name, uid=owner.uid
    )


def build(config: NodesConfig, request: Request, namespace: str, owner: Any) -> dict[str, Any]:
    """The object to create.

    Args:
        config: What the package asks for.
        request: The training.
        namespace: Of the run.
        owner: Owner reference of the launching pod (its workflow), or None.
    """
    metadata = m.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
        name=request.job_name,
        namespace=namespace,
        labels={LABEL: "dpo", **config.labels},
        ownerReferences=[owner_reference(owner)] if owner else None,
    )
    if config.options.kind == "PyTorchJob":
        return _pytorch_job(config, request, metadata)
    job = m.TrainerV1alpha1TrainJob(
        apiVersion="trainer.kubeflow.org/v1alpha1",
        kind="TrainJob",
        metadata=metadata,
        spec=m.TrainerV1alpha1TrainJobSpec(
            runtimeRef=m.TrainerV1alpha1RuntimeRef(
                name=config.options.runtime, kind=config.options.runtime_kind
            ),
            activeDeadlineSeconds=config.timeout_seconds or None,
            trainer=_trainer(config, request),
            runtimePatches=[_patch(config)],
        ),
    )
    return dict(job.to_dict())


def _trainer(config: NodesConfig, request: Request) -> m.TrainerV1alpha1Trainer:
    return m.TrainerV1alpha1Trainer(
        image=config.image,
        command=_COMMAND,
        numNodes=config.options.count,
        # our launcher starts the processes of a node; the runtime must not count them again
        numProcPerNode=max(1, config.resources.gpus),
        resourcesPerNode=_amounts(config.resources),
        env=_environment(config, request),
    )


def _amounts(resources: NodeResources) -> m.IoK8sApiCoreV1ResourceRequirements:
    requests = {"cpu": resources.cpu, "memory": resources.memory}
    limits = {"memory": resources.memory_limit or resources.memory}
    if resources.cpu_limit:
        limits["cpu"] = resources.cpu_limit
    if resources.gpus:
        requests[resources.gpu_resource] = limits[resources.gpu_resource] = str(resources.gpus)
    return m.IoK8sApiCoreV1ResourceRequirements(
        requests={name: _quantity(value) for name, value in requests.items()},
        limits={name: _quantity(value) for name, value in limits.items()},
    )


def _quantity(value: str) -> m.IoK8sApimachineryPkgApiResourceQuantity:
    return m.IoK8sApimachineryPkgApiResourceQuantity(value)


def _environment(config: NodesConfig, request: Request) -> list[m.IoK8sApiCoreV1EnvVar]:
    plain = {
        **config.environment,
        **(cache_variables(config.model_cache_path) if config.model_cache else {}),
        VARIABLE: request.to_json(),
        "DPO_PROCESSES": str(max(1, config.resources.gpus)),
    }
    variables = [m.IoK8sApiCoreV1EnvVar(name=name, value=value) for name, value in plain.items()]
    for key, name in config.secret_keys.items() if config.secret else ():
        selector = m.IoK8sApiCoreV1SecretKeySelector(name=config.secret, key=key)
        source = m.IoK8sApiCoreV1EnvVarSource(secretKeyRef=selector)
        variables.append(m.IoK8sApiCoreV1EnvVar(name=name, valueFrom=source))
    return variables


def _patch(config: NodesConfig) -> m.TrainerV1alpha1RuntimePatch:
    """Where the pods run, their volumes and rights, over what the runtime says."""
    container = m.TrainerV1alpha1ContainerPatch(
        name=_TRAINJOB_CONTAINER,
        volumeMounts=_mounts(config),
        securityContext=_container_security(),
    )
    pod = m.TrainerV1alpha1PodTemplatePatch(
        metadata=_pod_metadata(config),
        spec=m.TrainerV1alpha1PodSpecPatch(**_pod(config), containers=[container]),
    )
    node = m.TrainerV1alpha1ReplicatedJobPatch(
        name="node",
        template=m.TrainerV1alpha1JobTemplatePatch(
            spec=m.TrainerV1alpha1JobSpecPatch(template=pod)
        ),
    )
    return m.TrainerV1alpha1RuntimePatch(
        manager=MANAGER,
        trainingRuntimeSpec=m.TrainerV1alpha1TrainingRuntimeSpecPatch(
            template=m.TrainerV1alpha1JobSetTemplatePatch(
                spec=m.TrainerV1alpha1JobSetSpecPatch(replicatedJobs=[node])
            )
        ),
    )


def _pod(config: NodesConfig) -> dict[str, Any]:
    """Fields that a pod's specification and its patch have in common, by their JSON names."""
    resources = config.resources
    return {
        "affinity": _affinity(resources),
        "nodeSelector": resources.node_selector or None,
        "tolerations": [m.IoK8sApiCoreV1Toleration(**given) for given in resources.tolerations]
        or None,
        "imagePullSecrets": [
            m.IoK8sApiCoreV1LocalObjectReference(name=name) for name in config.image_pull_secrets
        ]
        or None,
        "serviceAccountName": config.options.service_account,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": m.IoK8sApiCoreV1PodSecurityContext(
            runAsNonRoot=True,
            seccompProfile=m.IoK8sApiCoreV1SeccompProfile(type="RuntimeDefault"),
        ),
        "volumes": _volumes(config),
    }


def _pod_metadata(config: NodesConfig) -> m.IoK8sApimachineryPkgApisMetaV1ObjectMeta:
    return m.IoK8sApimachineryPkgApisMetaV1ObjectMeta(labels={**_NO_SIDECAR, **config.labels})


def _affinity(resources: NodeResources) -> m.IoK8sApiCoreV1Affinity | None:
    if not resources.affinity:
        return None
    terms = [m.IoK8sApiCoreV1NodeSelectorRequirement(**term) for term in resources.affinity]
    return m.IoK8sApiCoreV1Affinity(
        nodeAffinity=m.IoK8sApiCoreV1NodeAffinity(
            requiredDuringSchedulingIgnoredDuringExecution=m.IoK8sApiCoreV1NodeSelector(
                nodeSelectorTerms=[m.IoK8sApiCoreV1NodeSelectorTerm(matchExpressions=terms)]
            )
        )
    )


def _volumes(config: NodesConfig) -> list[m.IoK8sApiCoreV1Volume]:
    volumes = [
        m.IoK8sApiCoreV1Volume(name=_SCRATCH, emptyDir=m.IoK8sApiCoreV1EmptyDirVolumeSource())
    ]
    if config.resources.shared_memory:
        size = _quantity(config.resources.shared_memory)
        memory = m.IoK8sApiCoreV1EmptyDirVolumeSource(medium="Memory", sizeLimit=size)
        volumes.append(m.IoK8sApiCoreV1Volume(name=_SHM, emptyDir=memory))
    if config.model_cache:
        claim = m.IoK8sApiCoreV1PersistentVolumeClaimVolumeSource(claimName=config.model_cache)
        volumes.append(m.IoK8sApiCoreV1Volume(name=_CACHE, persistentVolumeClaim=claim))
    return volumes


def _mounts(config: NodesConfig) -> list[m.IoK8sApiCoreV1VolumeMount]:
    mounts = [m.IoK8sApiCoreV1VolumeMount(name=_SCRATCH, mountPath="/tmp")]  # nosec B108
    if config.resources.shared_memory:
        mounts.append(m.IoK8sApiCoreV1VolumeMount(name=_SHM, mountPath="/dev/shm"))  # nosec B108
    if config.model_cache:
        mounts.append(m.IoK8sApiCoreV1VolumeMount(name=_CACHE, mountPath=config.model_cache_path))
    return mounts


def _container_security() -> m.IoK8sApiCoreV1SecurityContext:
    """What Pod Security's level ``restricted`` asks for, and a root file system that stays."""
    return m.IoK8sApiCoreV1SecurityContext(
        allowPrivilegeEscalation=False,
        capabilities=m.IoK8sApiCoreV1Capabilities(drop=["ALL"]),
        readOnlyRootFilesystem=True,
    )


def _pytorch_job(
    config: NodesConfig, request: Request, metadata: m.IoK8sApimachineryPkgApisMetaV1ObjectMeta
) -> dict[str, Any]:
    """A PyTorchJob: one master, the other nodes workers, all alike."""
    container = m.IoK8sApiCoreV1Container(
        name=_PYTORCH_CONTAINER,
        image=config.image,
        imagePullPolicy=config.image_pull_policy,
        command=_COMMAND,
        env=_environment(config, request),
        resources=_amounts(config.resources),
        volumeMounts=_mounts(config),
        securityContext=_container_security(),
        ports=[m.IoK8sApiCoreV1ContainerPort(name="pytorchjob-port", containerPort=_PORT)],
    )
    template = m.IoK8sApiCoreV1PodTemplateSpec(
        metadata=_pod_metadata(config),
        spec=m.IoK8sApiCoreV1PodSpec(**_pod(config), containers=[container]),
    ).to_dict()
    # every try of the step makes a new job: the operator itself does not restart
    replica = {"restartPolicy": "Never", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata.to_dict(),
        "spec": {
            "nprocPerNode": str(max(1, config.resources.gpus)),
            "runPolicy": {
                "cleanPodPolicy": "None",
                "backoffLimit": 0,
                **(
                    {"activeDeadlineSeconds": config.timeout_seconds}
                    if config.timeout_seconds
                    else {}
                ),
            },
            "pytorchReplicaSpecs": {
                "Master": {"replicas": 1, **replica},
                "Worker": {"replicas": config.options.count - 1, **replica},
            },
        },
    }
