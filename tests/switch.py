"""What the whole suite leaves out and `STF_JAX_TEST_ALL=1` puts back; CONTRIBUTING lists it."""

import os

ALL = os.environ.get("STF_JAX_TEST_ALL", "0") != "0"
