# pyright: reportAttributeAccessIssue=false
"""Programmatic dependent launch: a kernel starts while the one before it in the stream ends."""

import cutlass.cute as cute


def results_of_the_last_kernel(pdl: bool):
    """Waits until what ran before is done and visible, then lets the next kernel start early.

    To be called by all threads before they read or write global memory. The next kernel waits in
    the same way, so its early CTAs only spare it the launch; they come when all CTAs of this one
    are running, and take nobody's place.
    """
    if pdl:
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
