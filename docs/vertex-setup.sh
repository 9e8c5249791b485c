#!/usr/bin/env bash
# Makes of an empty Google Cloud project one that sogclr submit can use: APIs, buckets, a repository of images, service
# accounts with no more rights than they use, a secret for MLflow's password. Prints the commands; --apply carries them out.
# What is there already is left as it is, so that it can be run again.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: docs/vertex-setup.sh --project P --region R --bucket NAME --user EMAIL [--raw-bucket NAME] [--delete] [--apply]

  --project P        project, which exists and has billing
  --region R         where jobs run, as in europe-west4; buckets and images are made there
  --bucket NAME      bucket of all that jobs write
  --raw-bucket NAME  bucket of the raw archives, which exists, if it is another one
  --user EMAIL       who submits jobs
  --delete           undo it: delete the bucket with all that is in it, the images, the secret and the service account
  --apply            do it; without this the commands are printed and nothing is done
USAGE
}

project= region= bucket= raw_bucket= user= apply= delete=
while (($#)); do
    case $1 in
        --project | --region | --bucket | --raw-bucket | --user)
            (($# > 1)) || { echo "error: $1 needs a value" >&2; exit 2; }
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2
            ;;
        --apply) apply=yes; shift ;;
        --delete) delete=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        *) echo "error: there is no option $1; --help lists them" >&2; exit 2 ;;
    esac
done
for name in project region bucket user; do
    [[ -n ${!name} ]] || { echo "error: --$name is missing; --help lists the options" >&2; exit 2; }
done
if [[ -n $apply ]] && ! command -v gcloud >/dev/null; then
    echo "error: gcloud is not installed" >&2
    exit 2
fi

steps=sogclr-steps@$project.iam.gserviceaccount.com
steps_roles=(aiplatform.user dataflow.developer dataflow.worker logging.logWriter serviceusage.serviceUsageConsumer)

run() {
    printf '%q ' "$@"
    echo
    [[ -z $apply ]] || "$@"
}

# Runs the second command where the first, separated by --, finds nothing.
unless() {
    local look=()
    while [[ $1 != -- ]]; do look+=("$1"); shift; done
    shift
    if [[ -n $apply ]] && "${look[@]}" >/dev/null 2>&1; then
        echo "# there already: ${*:1:6}"
        return
    fi
    run "$@"
}

grant_project() { run gcloud projects add-iam-policy-binding "$project" --member="$1" --role="$2" --condition=None --quiet; }
grant_bucket() { run gcloud storage buckets add-iam-policy-binding "gs://$1" --member="$2" --role="$3"; }

if [[ -n $delete ]]; then
    run gcloud storage rm "gs://$bucket" --recursive
    run gcloud artifacts repositories delete sogclr --project="$project" --location="$region" --quiet
    run gcloud secrets delete sogclr-mlflow --project="$project" --quiet
    for role in "${steps_roles[@]}"; do
        run gcloud projects remove-iam-policy-binding "$project" --member="serviceAccount:$steps" --role="roles/$role" \
            --condition=None --quiet
    done
    run gcloud iam service-accounts delete "$steps" --project="$project" --quiet
    [[ -n $apply ]] || echo "# nothing was done: --apply does it"
    exit
fi

echo "# APIs"
run gcloud services enable aiplatform.googleapis.com dataflow.googleapis.com compute.googleapis.com storage.googleapis.com \
    artifactregistry.googleapis.com secretmanager.googleapis.com iam.googleapis.com logging.googleapis.com --project="$project"

echo "# Where things are"
unless gcloud storage buckets describe "gs://$bucket" -- \
    gcloud storage buckets create "gs://$bucket" --project="$project" --location="$region" --uniform-bucket-level-access \
    --public-access-prevention --soft-delete-duration=0
unless gcloud artifacts repositories describe sogclr --project="$project" --location="$region" -- \
    gcloud artifacts repositories create sogclr --project="$project" --location="$region" --repository-format=docker

echo "# The steps, as whom they run: to start custom jobs and Dataflow jobs as themselves, to be a Dataflow worker, to log"
unless gcloud iam service-accounts describe "$steps" --project="$project" -- \
    gcloud iam service-accounts create sogclr-steps --project="$project" --display-name="steps of sogclr"
for role in "${steps_roles[@]}"; do
    grant_project "serviceAccount:$steps" "roles/$role"
done
run gcloud iam service-accounts add-iam-policy-binding "$steps" --project="$project" --member="serviceAccount:$steps" \
    --role=roles/iam.serviceAccountUser
grant_bucket "$bucket" "serviceAccount:$steps" roles/storage.objectUser
grant_bucket "$bucket" "serviceAccount:$steps" roles/storage.legacyBucketReader
if [[ -n $raw_bucket && $raw_bucket != "$bucket" ]]; then
    grant_bucket "$raw_bucket" "serviceAccount:$steps" roles/storage.objectViewer
    grant_bucket "$raw_bucket" "serviceAccount:$steps" roles/storage.legacyBucketReader
fi
run gcloud artifacts repositories add-iam-policy-binding sogclr --project="$project" --location="$region" \
    --member="serviceAccount:$steps" --role=roles/artifactregistry.reader

echo "# MLflow's password, or token, which you put in yourself:"
echo "#   printf 'USER:PASSWORD' | gcloud secrets versions add sogclr-mlflow --project=$project --data-file=-"
unless gcloud secrets describe sogclr-mlflow --project="$project" -- \
    gcloud secrets create sogclr-mlflow --project="$project" --replication-policy=automatic
run gcloud secrets add-iam-policy-binding sogclr-mlflow --project="$project" --member="serviceAccount:$steps" \
    --role=roles/secretmanager.secretAccessor

echo "# Who submits: to make jobs and cancel them, to have them run as the steps' account, to push images, to look at data"
grant_project "user:$user" roles/aiplatform.user
grant_project "user:$user" roles/dataflow.developer
grant_project "user:$user" roles/serviceusage.serviceUsageConsumer
run gcloud iam service-accounts add-iam-policy-binding "$steps" --project="$project" --member="user:$user" \
    --role=roles/iam.serviceAccountUser
run gcloud artifacts repositories add-iam-policy-binding sogclr --project="$project" --location="$region" \
    --member="user:$user" --role=roles/artifactregistry.writer
grant_bucket "$bucket" "user:$user" roles/storage.objectUser
grant_bucket "$bucket" "user:$user" roles/storage.legacyBucketReader
if [[ -n $raw_bucket && $raw_bucket != "$bucket" ]]; then
    grant_bucket "$raw_bucket" "user:$user" roles/storage.objectViewer
    grant_bucket "$raw_bucket" "user:$user" roles/storage.legacyBucketReader
fi

[[ -n $apply ]] || echo "# nothing was done: --apply does it"
