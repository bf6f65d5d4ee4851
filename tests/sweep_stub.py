"""The stub W&B server with sweeps: what `wandb sweep` and `wandb agent` ask. Written against wandb 0.31.0.

It keeps sweep files as they are sent and hands each agent the combinations of a grid, one at a time, then tells it to end.
"""

import itertools
import json

import yaml
from wandb_stub import ENTITY, WandbStub


class SweepStub(WandbStub):
    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.sweeps: dict[str, dict] = {}

    def op_UpsertSweep(self, v: dict) -> dict:
        name = f"sweep{len(self.sweeps)}"
        config = yaml.safe_load(v["config"])
        lists = {
            key: entry["values"] if "values" in entry else [entry.get("value")]
            for key, entry in config["parameters"].items()
        }
        grid = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
        self.sweeps[name] = {"config": v["config"], "project": v["projectName"], "waiting": grid, "given": {}}
        project = {"id": "project", "name": v["projectName"], "entity": {"id": "entity", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def op_UpsertBucket(self, v: dict) -> dict:
        answer = super().op_UpsertBucket(v)
        self.run(v["name"]).setdefault("sweep", v.get("sweep"))
        return answer

    def op_SweepWithRuns(self, v: dict) -> dict:
        sweep = self.sweeps.get(v["sweep"])
        if sweep is None or sweep["project"] != v["project"]:
            return {"project": {"sweep": None}}
        return {"project": {"sweep": {"id": v["sweep"], "name": v["sweep"], "config": sweep["config"],
                                      "state": "RUNNING", "runs": {"edges": []}}}}  # fmt: skip

    def op_CreateAgent(self, v: dict) -> dict:
        return {"createAgent": {"agent": {"id": v["sweep"]}}}

    def op_Heartbeat(self, v: dict) -> dict:
        """The next combination for an agent that runs nothing; after the last one, 'exit'."""
        sweep, commands = self.sweeps[v["id"]], []
        if not json.loads(v["runState"]):
            if sweep["waiting"]:
                parameters, run = sweep["waiting"].pop(0), f"{v['id']}run{len(sweep['given'])}"
                sweep["given"][run] = parameters
                commands.append(
                    {
                        "type": "run",
                        "run_id": run,
                        "program": yaml.safe_load(sweep["config"])["program"],
                        "args": {name: {"value": value} for name, value in parameters.items()},
                    }
                )
            else:
                commands.append({"type": "exit"})
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}
