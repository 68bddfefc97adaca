"""Which rank this process is, under each launcher, and launchers that set nonsense."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_scale.errors import ConfigError
from moe_scale.parallel.launch import Launch, detect, export

SRUN = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_PROCID": "4", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0"}  # fmt: skip


def test_no_launcher() -> None:
    launch = detect({})
    assert launch == Launch(0, 1, 0, 1, "none")
    assert launch.is_main
    assert launch.is_host_main
    assert launch.num_nodes == 1


def test_torchrun() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    launch = detect(env)
    assert launch == Launch(5, 8, 1, 4, "env")
    assert not launch.is_main
    assert not launch.is_host_main
    assert launch.num_nodes == 2


def test_deepspeed() -> None:
    assert detect({"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_SIZE": "4"}) == Launch(4, 8, 0, 4, "env")
    assert detect({"RANK": "1", "WORLD_SIZE": "2"}) == Launch(1, 2, 1, 2, "env"), "one host is the best guess"


def test_srun() -> None:
    launch = detect(SRUN)
    assert launch == Launch(4, 7, 0, 2, "srun")
    assert not launch.is_main
    assert launch.is_host_main
    assert launch.num_nodes == 4


@pytest.mark.parametrize(
    ("spec", "node", "expected"),
    [("2(x3),1", 0, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("4", 0, 4), ("1,3,2", 1, 3), ("8(x2)", 1, 8),
     ("1,2(x2),3", 2, 2), ("2(x999999999999)", 5, 2)],
)  # fmt: skip
def test_srun_tasks_per_node(spec: str, node: int, expected: int) -> None:
    env = SRUN | {"SLURM_STEP_TASKS_PER_NODE": spec, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
    assert detect(env).local_world_size == expected


def test_mpirun() -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, (3, 4, 1, 2), strict=True)}
    launch = detect(env)
    assert launch == Launch(3, 4, 1, 2, "mpirun")
    assert detect(env | {"RANK": "0", "WORLD_SIZE": "1"}).launcher == "env"
    assert detect({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}).launcher == "none"
    with pytest.raises(ConfigError, match="start the ranks with moe-scale launch"):
        detect({"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD: rank"):
        detect(env | {"OMPI_COMM_WORLD_RANK": "4"})


def test_srun_inside_a_launcher_of_its_own() -> None:
    """One srun task a node that runs torchrun: the inner launcher knows better."""
    assert detect(SRUN | {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).launcher == "env"


def test_a_batch_script_without_srun_is_one_process() -> None:
    env = {
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "8",
        "SLURM_JOB_NUM_NODES": "2",
    }
    assert detect(env) == Launch(0, 1, 0, 1, "none")


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [
        *((TORCHRUN, name, value) for name in TORCHRUN for value in ("abc", "", "-1", "1.0", " 1", "\u00b2", "\u0663")),
        *((TORCHRUN, name, None) for name in ("RANK", "WORLD_SIZE")),
        *((TORCHRUN, name, value) for name, value in [("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "0")]),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "0"),
        *((SRUN, name, "abc") for name in SRUN if name not in ("SLURM_JOB_ID", "SLURM_STEP_ID")),
        *((SRUN, "SLURM_STEP_TASKS_PER_NODE", spec) for spec in ("", "2(x)", "(x3)", "2,,1", "-1", "0")),
        (SRUN, "SLURM_LOCALID", None),
        (SRUN, "SLURM_LOCALID", "2"),
        (SRUN, "SLURM_PROCID", "7"),
    ],
)
def test_garbage_is_a_problem(base: dict[str, str], name: str, value: str | None) -> None:
    env = dict(base)
    del env[name]
    with pytest.raises(ConfigError) as raised:
        detect(env | ({} if value is None else {name: value}))
    message = str(raised.value)
    assert name in message or "fit" in message
    assert "\n" not in message.strip() or "fit" in message


@given(
    st.dictionaries(st.sampled_from([*TORCHRUN, *SRUN, "LOCAL_SIZE"]), st.integers(0, 9).map(str) | st.text(max_size=4))
)
def test_any_environment(env: dict[str, str]) -> None:
    try:
        launch = detect(env)
    except ConfigError as error:
        assert error.problems  # noqa: PT017 (either outcome is right)
    else:
        assert 0 <= launch.rank < launch.world_size
        assert 0 <= launch.local_rank < launch.local_world_size
        assert launch.num_nodes >= 1


# --- what torch.distributed reads ------------------------------------------------------------------------------------

EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*EXPORTED, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def exported(launch: Launch) -> dict[str, str]:
    export(launch)
    return {name: os.environ[name] for name in EXPORTED if name in os.environ}


def test_export_of_one_process() -> None:
    found = exported(Launch(0, 1, 0, 1, "none"))
    port = int(found.pop("MASTER_PORT"))
    assert 1024 <= port < 65536
    assert found == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip


def test_export_keeps_what_a_launcher_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    assert exported(Launch(1, 2, 1, 2, "env")) == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2",
        "MASTER_ADDR": "host", "MASTER_PORT": "7",
    }  # fmt: skip


def test_mpirun_on_several_hosts_needs_the_address_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        export(Launch(3, 4, 1, 2, "mpirun"))
    assert exported(Launch(1, 2, 1, 2, "mpirun"))["MASTER_ADDR"] == "127.0.0.1", "one host"
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    assert exported(Launch(3, 4, 1, 2, "mpirun"))["MASTER_ADDR"] == "node-1"


def test_the_interface_holds_for_gloo_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    monkeypatch.setenv("MOE_SCALE_INTERFACE", "lo")
    export(Launch(0, 1, 0, 1, "none"))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "mine", "what a user says for one library wins"
    monkeypatch.setenv("MOE_SCALE_INTERFACE", "none0")
    with pytest.raises(ConfigError, match=r"'none0' is no network interface of this host; choose one of .*lo"):
        export(Launch(0, 1, 0, 1, "none"))


def ports(monkeypatch: pytest.MonkeyPatch, job: str, step: str, rank: int = 0) -> str:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_STEP_ID", step)
    for name in EXPORTED:
        monkeypatch.delenv(name, raising=False)
    return exported(Launch(rank, 4, rank, 4, "srun"))["MASTER_PORT"]


def test_srun_port_is_the_same_on_every_rank_and_differs_between_jobs_and_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ports(monkeypatch, "123", "0", rank=0) == ports(monkeypatch, "123", "0", rank=3)
    assert len({ports(monkeypatch, job, step) for job in ("123", "124") for step in ("0", "1")}) == 4


def test_srun_with_garbage_for_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID"):
        ports(monkeypatch, "abc", "0")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-005,9],login1", "gpu003"),
        ("gpu[9,003-005]", "gpu9"),
        ("login1,gpu[003-005]", "login1"),
        ("node7", "node7"),
        ("node-a.cluster.example,node-b", "node-a.cluster.example"),
        ("gpu-[01-04]", "gpu-01"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("gpu[1-2]-ib,gpu9", "gpu1-ib"),
    ],
)
def test_srun_first_host(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "other[1-9]")
    assert exported(Launch(0, 4, 0, 4, "srun"))["MASTER_ADDR"] == first
