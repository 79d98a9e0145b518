#!/usr/bin/env bash
# Install the chart on a cluster of kind, classify, roll under load, count lost requests, and turn on a key and TLS.
# Needs docker, kind, kubectl, helm and openssl. IMAGE names an image that exists; otherwise the image is built.
set -euo pipefail
cd "$(dirname "$0")/.."

for program in docker kind kubectl helm openssl; do
  command -v "$program" >/dev/null || { echo "$program is missing; NOTHING was tested" >&2; exit 2; }
done

cluster=fovea-test
namespace=photos
image=${IMAGE:-fovea:kind}
kubeconfig=$(mktemp)
secrets=$(mktemp -d)
export KUBECONFIG=$kubeconfig

stop() {
  [ -z "${forward:-}" ] || kill "$forward" 2>/dev/null || true
  [ -n "${KEEP:-}" ] || kind delete cluster --name "$cluster"
  rm -rf "$kubeconfig" "$secrets"
}
trap stop EXIT

[ -n "${IMAGE:-}" ] || docker build --target cpu --tag "$image" .
kind create cluster --name "$cluster" --wait 120s --config - <<YAML
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes: [{role: control-plane}, {role: worker}, {role: worker}]
YAML
kind load docker-image "$image" --name "$cluster"

kubectl create namespace "$namespace"
# Kubernetes itself refuses pods that are not restricted.
kubectl label namespace "$namespace" pod-security.kubernetes.io/enforce=restricted

small='{"requests":{"cpu":"500m","memory":"1Gi"},"limits":{"cpu":"1","memory":"2Gi"}}'
helm install fovea deploy/helm/fovea --namespace "$namespace" --wait --timeout 5m \
  --set image.repository="${image%:*}" --set image.tag="${image##*:}" --set-json "resources=$small"
helm test fovea --namespace "$namespace" --logs

# A pod classifies all the time, through the Service, while the pods of the service are replaced.
kubectl --namespace "$namespace" create configmap load --from-file=deploy/helm/fovea/files/classify.py
kubectl --namespace "$namespace" apply --filename - <<YAML
apiVersion: v1
kind: Pod
metadata: {name: load}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {runAsNonRoot: true, runAsUser: 10001, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: load
      image: $image
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
      volumeMounts: [{name: load, mountPath: /load}]
      command: [sh, -c]
      args:
        - |
          end=\$(( \$(date +%s) + 90 )) calls=0 lost=0
          while [ \$(date +%s) -lt \$end ]; do
            python3 -IS /load/classify.py fovea 80 >/dev/null || lost=\$((lost + 1))
            calls=\$((calls + 1))
          done
          echo "\$calls calls, \$lost lost"
          [ \$lost = 0 ] && [ \$calls -ge 50 ]
  volumes: [{name: load, configMap: {name: load}}]
YAML
kubectl --namespace "$namespace" wait --for=condition=Ready pod/load --timeout=60s
kubectl --namespace "$namespace" rollout restart deployment/fovea
kubectl --namespace "$namespace" rollout status deployment/fovea --timeout=5m
kubectl --namespace "$namespace" wait --for=jsonpath='{.status.phase}'=Succeeded pod/load --timeout=120s || {
  kubectl --namespace "$namespace" logs load
  echo "calls were lost during the roll-out" >&2
  exit 1
}
kubectl --namespace "$namespace" logs load

# From outside, and a photograph of the samples.
kubectl --namespace "$namespace" port-forward service/fovea 18080:80 >/dev/null &
forward=$!
curl --fail --silent --retry 10 --retry-connrefused --retry-delay 1 \
  --data-binary @samples/ship.jpg http://127.0.0.1:18080/v1/classify
echo

# With a key and TLS: `helm test` shows the key to the holder of the certificate alone.
docker run --rm --user "$(id -u):$(id -g)" --volume "$secrets:/secrets" "$image" \
  keys add test --scope classify --file /secrets/keys | tr -d '\n' >"$secrets/key"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 2 -subj /CN=fovea \
  -keyout "$secrets/tls.key" -out "$secrets/tls.crt"
kubectl --namespace "$namespace" create secret generic api-keys --from-file=keys="$secrets/keys"
kubectl --namespace "$namespace" create secret generic test-key --from-file=key="$secrets/key"
kubectl --namespace "$namespace" create secret tls fovea-tls --cert "$secrets/tls.crt" --key "$secrets/tls.key"
helm upgrade fovea deploy/helm/fovea --namespace "$namespace" --reset-then-reuse-values --wait --timeout 5m \
  --set keys.secret=api-keys,tls.secret=fovea-tls,test.key.secret=test-key,test.key.entry=key
helm test fovea --namespace "$namespace" --logs

echo "the chart works on $(kubectl version --output json | grep -o '"gitVersion": "[^"]*"' | tail -1)"
