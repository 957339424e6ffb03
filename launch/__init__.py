"""Starts a run where the TPUs are: TPU VMs, GKE through XPK, hosts with ssh, or this machine.

    python -m launch tpu|xpk|ssh VERB ...      python -m launch local ...

Run it in a clone, which it sends to the workers; so it is not part of the wheel. It needs stf_jax,
and `gcloud`, `xpk` or `ssh`. docs/launching.md goes from an empty project to a running stage 2.
"""
