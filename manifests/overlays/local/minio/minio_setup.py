"""Makes a bucket without public access and a user who is limited to one prefix of it.

    python3 minio_setup.py ENDPOINT BUCKET PREFIX

MINIO_ROOT_USER and MINIO_ROOT_PASSWORD are the server's own; AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY those of the user to be made. Run again, it sets all of it once more.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from urllib.parse import urlsplit

from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from urllib3.exceptions import HTTPError

_OBJECTS = (
    *("s3:GetObject", "s3:PutObject", "s3:DeleteObject"),
    *("s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"),
)


def bucket_policy(bucket: str) -> dict[str, Any]:
    """Who shows no credentials gets nothing, whatever else is set."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": {"AWS": ["*"]},
                "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
                "Resource": [f"arn:aws:s3:::{bucket}/*"],
            }
        ],
    }


def user_policy(bucket: str, prefix: str) -> dict[str, Any]:
    """Everything under the prefix; of the bucket that it exists, and the list of that part."""
    here = [f"arn:aws:s3:::{bucket}"]
    return {
        "Version": "2012-10-17",
        "Statement": [
            # MinIO knows no condition for the second: names of unfinished uploads, for `dpo retain`
            {
                "Effect": "Allow",
                "Action": ["s3:GetBucketLocation", "s3:ListBucketMultipartUploads"],
                "Resource": here,
            },
            {
                "Effect": "Allow",
                "Action": ["s3:ListBucket"],
                "Resource": here,
                "Condition": {"StringLike": {"s3:prefix": [f"{prefix}/*"]}},
            },
            # HEAD of the bucket has no prefix: so a client finds out that the bucket is there.
            # A list without one is allowed with it: names, and no object's content
            {
                "Effect": "Allow",
                "Action": ["s3:ListBucket"],
                "Resource": here,
                "Condition": {"Null": {"s3:prefix": "true"}},
            },
            {
                "Effect": "Allow",
                "Action": list(_OBJECTS),
                "Resource": [f"arn:aws:s3:::{bucket}/{prefix}/*"],
            },
        ],
    }


def main(endpoint: str, bucket: str, prefix: str) -> None:
    """See the module's description."""
    parts = urlsplit(endpoint)
    secure = parts.scheme == "https"
    root, password = os.environ["MINIO_ROOT_USER"], os.environ["MINIO_ROOT_PASSWORD"]
    client = Minio(parts.netloc, access_key=root, secret_key=password, secure=secure)
    if not client.bucket_exists(bucket):
        client.make_bucket(bucket)
    client.set_bucket_policy(bucket, json.dumps(bucket_policy(bucket)))
    admin = MinioAdmin(
        endpoint=parts.netloc, credentials=StaticProvider(root, password), secure=secure
    )
    user, name = os.environ["AWS_ACCESS_KEY_ID"], f"{bucket}-{prefix}"
    admin.policy_add(name, policy=user_policy(bucket, prefix))
    admin.user_add(user, os.environ["AWS_SECRET_ACCESS_KEY"])
    admin.policy_set(name, user=user)
    print(f"bucket {bucket} is there; the user of the Secret may use {prefix}/ in it")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except HTTPError as error:
        # its image may be pulled for minutes beside this pod's; the Job tries again
        sys.exit(f"{sys.argv[1]} does not answer yet: {error}")
