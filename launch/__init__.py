"""Starting a run where the TPUs are: TPU VMs, GKE through XPK, hosts by ssh, or this machine.

    python -m launch tpu|xpk|ssh VERB ...      python -m launch local ...

It is used from a clone, which it sends to the workers, and so is not part of the wheel. Beside
stf_jax it needs `gcloud`, `xpk` or `ssh`. docs/launching.md goes from an empty project to a running
stage 2.
"""
