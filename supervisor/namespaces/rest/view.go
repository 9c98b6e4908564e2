package rest

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// The answers about namespaces: Instances.Info, InfoV2, Summary, SummaryV2.

type instanceInfo struct {
	Cluster string `json:"cluster"`
	infoCore
}

type instanceInfoV2 struct {
	Supervisor string     `json:"supervisor"`
	Zones      []zoneInfo `json:"zones"`
	infoCore
}

type zoneInfo struct {
	Zone             string `json:"zone"`
	Type             string `json:"type"`
	MarkedForRemoval bool   `json:"marked_for_removal"`
}

type infoCore struct {
	ConfigStatus string            `json:"config_status"`
	Messages     []instanceMessage `json:"messages"`
	Stats        stats             `json:"stats"`
	SelfService  bool              `json:"self_service_namespace"`
	settingsView
}

type instanceMessage struct {
	Severity string  `json:"severity"`
	Details  message `json:"details"`
}

// stats are in MHz and MiB.
type stats struct {
	CPU     int64 `json:"cpu_used"`
	Memory  int64 `json:"memory_used"`
	Storage int64 `json:"storage_used"`
}

type instanceSummary struct {
	Cluster string `json:"cluster"`
	summaryCore
}

type instanceSummaryV2 struct {
	Supervisor string `json:"supervisor"`
	summaryCore
}

type summaryCore struct {
	Namespace    string `json:"namespace"`
	Description  string `json:"description"`
	ConfigStatus string `json:"config_status"`
	Stats        stats  `json:"stats"`
	SelfService  bool   `json:"self_service_namespace"`
}

// config_status of vSphere.
const (
	statusConfiguring = "CONFIGURING"
	statusRemoving    = "REMOVING"
	statusRunning     = "RUNNING"
	statusError       = "ERROR"
)

// passing are reasons that end without anybody's help: vSphere's ERROR is what
// an administrator must see to.
var passing = []string{
	"", v1alpha1.ReasonProgressing, v1alpha1.ReasonDrift, v1alpha1.ReasonQuotaEdited, v1alpha1.ReasonDraining,
	v1alpha1.ReasonTaskTimeout, v1alpha1.ReasonVCenterUnreachable,
}

// configStatus is a namespace's, by its conditions.
func configStatus(ns *v1alpha1.SupervisorNamespace) string {
	if ns.DeletionTimestamp != nil {
		return statusRemoving
	}
	return conditionStatus(ns.Status.Conditions, ns.Generation, v1alpha1.ConditionReady, v1alpha1.ConditionSynced)
}

// conditionStatus is RUNNING when all of the conditions hold for the generation,
// ERROR when one fails for a reason that lasts.
func conditionStatus(conditions []metav1.Condition, generation int64, types ...string) string {
	status := statusRunning
	for _, t := range types {
		c := meta.FindStatusCondition(conditions, t)
		switch {
		case c == nil || c.ObservedGeneration < generation:
			if status == statusRunning {
				status = statusConfiguring
			}
		case c.Status == metav1.ConditionTrue:
		case c.Status == metav1.ConditionFalse && !slices.Contains(passing, c.Reason):
			status = statusError
		case status == statusRunning:
			status = statusConfiguring
		}
	}
	return status
}

// messagesOf are the conditions that do not hold, and what the status tells
// people beyond them.
func messagesOf(conditions []metav1.Condition, told []v1alpha1.Message) []instanceMessage {
	out := []instanceMessage{}
	seen := map[string]bool{}
	add := func(severity, reason, text string) {
		if text != "" && !seen[reason+text] {
			seen[reason+text] = true
			out = append(out, instanceMessage{Severity: severity, Details: messageOf(reason, text)})
		}
	}
	for _, c := range conditions {
		switch {
		case c.Status == metav1.ConditionTrue:
		case c.Status == metav1.ConditionFalse && !slices.Contains(passing, c.Reason):
			add("ERROR", c.Reason, c.Message)
		default:
			add("WARNING", c.Reason, c.Message)
		}
	}
	for _, m := range told {
		add(strings.ToUpper(string(m.Severity)), m.Reason, m.Text)
	}
	return out
}

// statsOf is what a namespace uses. Without the hosts' clock CPU is 0: lists do
// not fail for it.
func statsOf(u *v1alpha1.Usage, c clock) stats {
	var s stats
	if u == nil {
		return s
	}
	if u.CPU != nil && c.known() {
		s.CPU = c.mhz(*u.CPU)
	}
	if u.Memory != nil {
		s.Memory = mib(*u.Memory)
	}
	var bytes resource.Quantity
	for _, p := range u.Storage {
		bytes.Add(p.Used)
	}
	s.Storage = mib(bytes)
	return s
}

func selfService(ns *v1alpha1.SupervisorNamespace) bool {
	return ns.Status.Template != "" || ns.Labels[v1alpha1.LabelTemplate] != ""
}

func viewInstance(ns *v1alpha1.SupervisorNamespace, env environment) (infoCore, error) {
	settings, err := viewSettings(&ns.Spec.NamespaceSettings, env)
	if err != nil {
		return infoCore{}, err
	}
	return infoCore{
		ConfigStatus: configStatus(ns),
		Messages:     messagesOf(ns.Status.Conditions, ns.Status.Messages),
		Stats:        statsOf(ns.Status.Usage, env.clock),
		SelfService:  selfService(ns),
		settingsView: settings,
	}, nil
}

func viewSummary(ns *v1alpha1.SupervisorNamespace, sv *v1alpha1.Supervisor) summaryCore {
	return summaryCore{
		Namespace:    ns.Name,
		Description:  ns.Spec.Description,
		ConfigStatus: configStatus(ns),
		Stats:        statsOf(ns.Status.Usage, clockOf(sv.Status.Zones, ns.Spec.Zones)),
		SelfService:  selfService(ns),
	}
}

// clusterOf is the cluster of a namespace's first zone: version 1 of the API
// knows one.
func clusterOf(ns *v1alpha1.SupervisorNamespace, sv *v1alpha1.Supervisor) string {
	for _, z := range zonesOf(sv, ns.Spec.Zones) {
		return z.Cluster
	}
	return ""
}
