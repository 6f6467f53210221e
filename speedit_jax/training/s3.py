"""Teaches orbax to save to s3://, of which tensorstore, which it writes arrays with, knows all that is needed.

Orbax 0.12 has one place that chooses tensorstore's driver for a path, and it chooses Google's or that for disks.
"""

import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

_SCHEME = "s3://"


def teach_orbax() -> None:
    """Has orbax take tensorstore's driver "s3" for s3://BUCKET/PATH; other paths go as before."""
    is_remote, normalized, spec_of_gcs = (
        tensorstore_utils._use_gcs_driver,
        tensorstore_utils._normalize_path,
        gcs_utils.get_kvstore_for_gcs,
    )
    if getattr(is_remote, "knows_s3", False):
        return

    def use_driver(directory: str) -> bool:
        return directory.startswith(_SCHEME) or is_remote(directory)

    def normalize(path: str) -> str:
        return f"{_SCHEME}{os.path.normpath(path.removeprefix(_SCHEME))}" if path.startswith(_SCHEME) else normalized(path)

    use_driver.knows_s3 = True
    tensorstore_utils._use_gcs_driver = use_driver
    tensorstore_utils._normalize_path = normalize
    gcs_utils.get_kvstore_for_gcs = lambda path: _spec(path) if path.startswith(_SCHEME) else spec_of_gcs(path)


def _spec(path: str) -> dict[str, Any]:
    """tensorstore's; it reads credentials as Amazon's tools do, but neither the endpoint nor, beside one, the region."""
    bucket, _, key = path.removeprefix(_SCHEME).partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": key}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        spec |= {"endpoint": endpoint, "aws_region": region}
    return spec
