"""`node.doctor`."""

from blyan_node.doctor.within import examine
from blyan_node.parts import App
from blyan_node.rpc.context import Context
from protocols.rpc import doctor


async def run(app: App, request: doctor.DoctorRequest, context: Context) -> doctor.DoctorResult:
    """What the node finds out about itself."""
    return doctor.DoctorResult(findings=await examine(app))
