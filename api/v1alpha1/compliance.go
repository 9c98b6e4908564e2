package v1alpha1

// Annotations of PersistentVolumes of csi.atoll.dev, and of the claims that have
// them: whether the volume is kept as its storage policy says.
const (
	// AnnotationPolicyCompliance is Compliant, NonCompliant or Unknown; nothing was
	// asked yet where it is missing.
	AnnotationPolicyCompliance = "atoll.dev/policy-compliance"
	// AnnotationPolicyComplianceReason is a sentence for people; there is none
	// where the volume is Compliant.
	AnnotationPolicyComplianceReason = "atoll.dev/policy-compliance-reason"
	// AnnotationPolicyComplianceBy is the node that says so, on the
	// PersistentVolume alone.
	AnnotationPolicyComplianceBy = "atoll.dev/policy-compliance-by"
)
