{{/* Name of all objects: the release's name, with the chart's name in it. */}}
{{- define "fovea.fullname" -}}
{{- if contains "fovea" .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-fovea" (.Release.Name | trunc 46 | trimSuffix "-") -}}
{{- end -}}
{{- end }}

{{/* The rules in deploy/alerts.yml name job="fovea", which is app.kubernetes.io/name. */}}
{{- define "fovea.selectorLabels" -}}
app.kubernetes.io/name: fovea
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fovea.labels" -}}
{{ include "fovea.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "fovea.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "fovea.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end }}

{{- define "fovea.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "fovea.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.user }}
runAsUser: {{ int . }}
runAsGroup: {{ int . }}
fsGroup: {{ int . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "fovea.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* A setting as text: YAML reads whole numbers as floats, and 1610612736 would become 1.610612736e+09. */}}
{{- define "fovea.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ printf "%.0f" . }}{{- else -}}{{ toString . }}{{- end -}}
{{- end }}

{{/* Folder or URI of the models; empty for those in the image. */}}
{{- define "fovea.models" -}}
{{- with .Values.models -}}
{{- if .uri -}}{{ .uri }}
{{- else if .image -}}{{ printf "/models/%s" (.image.path | default "") | trimSuffix "/" }}
{{- else -}}/models
{{- end -}}
{{- end -}}
{{- end }}

{{/* The request of a probe. Kubernetes does not verify the certificate. */}}
{{- define "fovea.probe" -}}
httpGet: {path: {{ .path }}, port: http{{ if .context.Values.tls.secret }}, scheme: HTTPS{{ end }}}
{{- end }}

{{/* Combinations that the schema cannot express. */}}
{{- define "fovea.check" -}}
{{- $settings := merge (deepCopy .Values.settings) (dict "FOVEA_DRAIN_GRACE" 7.0 "FOVEA_DRAIN_LIMIT" 20.0) -}}
{{- $drain := addf (float64 $settings.FOVEA_DRAIN_GRACE) (float64 $settings.FOVEA_DRAIN_LIMIT) 3.0 -}}
{{- if lt (float64 .Values.terminationGracePeriodSeconds) $drain -}}
{{- fail (printf "terminationGracePeriodSeconds is %v: it must be at least %v, FOVEA_DRAIN_GRACE + FOVEA_DRAIN_LIMIT + 3, or requests are lost when a pod stops" .Values.terminationGracePeriodSeconds $drain) -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas is %v, more than autoscaling.maxReplicas, %v" .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) -}}
{{- end -}}
{{- if and (has (toString .Values.rollout.maxSurge) (list "0" "0%")) (has (toString .Values.rollout.maxUnavailable) (list "0" "0%")) -}}
{{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0: no pod could be replaced. Set one of them to 1" -}}
{{- end -}}
{{- $names := concat (list "FOVEA_HOST") (keys .Values.settings) -}}
{{- range .Values.env -}}
{{- if has .name $names -}}
{{- fail (printf "env has %s a second time: settings, the chart or env sets it already. Settings belong into settings" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- range .Values.volumes -}}
{{- if has .name (list "state" "cache" "models" "api-keys" "tls" "client-ca") -}}
{{- fail (printf "volumes has a volume %s, which is the name of a volume of the chart. Choose another" .name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.settings.FOVEA_CALLER_BURST (not .Values.settings.FOVEA_CALLER_RATE) -}}
{{- fail "settings has FOVEA_CALLER_BURST without FOVEA_CALLER_RATE. Set both or neither" -}}
{{- end -}}
{{- if and .Values.tls.clientCA (not .Values.tls.secret) -}}
{{- fail "tls.clientCA needs tls.secret: without TLS, clients show no certificate" -}}
{{- end -}}
{{- if and .Values.test.certificateSecret (not .Values.tls.clientCA) -}}
{{- fail "test.certificateSecret needs tls.clientCA: without it, the service asks for no certificate" -}}
{{- end -}}
{{- range $name, $key := dict "test.key" .Values.test.key "serviceMonitor.key" .Values.serviceMonitor.key -}}
{{- if and $key (not $.Values.keys.secret) -}}
{{- fail (printf "%s needs keys.secret: without it, the service asks for no key" $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.serviceMonitor.tlsConfig (not .Values.tls.secret) -}}
{{- fail "serviceMonitor.tlsConfig needs tls.secret: without it, the service speaks plain HTTP" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled .Values.tls.clientCA (not .Values.serviceMonitor.tlsConfig.cert) -}}
{{- fail "serviceMonitor.tlsConfig needs cert and keySecret: with tls.clientCA, Prometheus needs a certificate" -}}
{{- end -}}
{{- if and .Values.service.externalTrafficPolicy (eq .Values.service.type "ClusterIP") -}}
{{- fail "service.externalTrafficPolicy needs service.type NodePort or LoadBalancer" -}}
{{- end -}}
{{- if and .Values.grpc.enabled (eq (int .Values.service.port) (int .Values.service.grpcPort)) -}}
{{- fail (printf "service.port and service.grpcPort are both %v. Choose another for one of them" .Values.service.port) -}}
{{- end -}}
{{- if and .Values.models.image (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "models.image needs Kubernetes 1.33, which mounts images as volumes; this cluster has %s. Use models.initContainer or models.persistentVolumeClaim" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end }}
