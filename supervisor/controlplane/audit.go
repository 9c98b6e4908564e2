package controlplane

import "path/filepath"

// auditPolicy logs who changed what, without contents: a body may be a Secret.
// Leases, events and the components' own status updates would be nine lines
// of ten.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
# Over WebSocket these are reads by their verb, and are not reads.
- level: Metadata
  resources: [{group: "", resources: [pods/exec, pods/attach, pods/portforward, nodes/proxy]}]
- level: None
  verbs: [get, list, watch]
- level: None
  nonResourceURLs: ["*"]
- level: None
  resources:
  - {group: "", resources: [events]}
  - {group: events.k8s.io, resources: [events]}
  - {group: coordination.k8s.io, resources: [leases]}
  - {group: authentication.k8s.io, resources: [tokenreviews]}
  - {group: authorization.k8s.io}
- level: None
  users: ["system:apiserver", "system:kube-controller-manager", "system:kube-scheduler"]
- level: None
  userGroups: ["system:nodes"]
  resources: [{group: "", resources: [nodes/status, pods/status, serviceaccounts/token]}]
- level: Metadata
`

func (c Config) auditPolicyFile() string { return filepath.Join(c.socketDir(), "audit-policy.yaml") }

func writeAuditPolicy(c Config) error {
	return writeIfChanged(c.auditPolicyFile(), []byte(auditPolicy), 0o600)
}
