package qemu

// A launchKind is how a VM was launched, and if it was booted, why.
type launchKind struct{ kind, reason string }

// Kinds of launches.
const (
	kindClone = "clone"
	kindWarm  = "warm"
	kindCold  = "cold"
)

func (s *templateStore) count(kind, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.launches[launchKind{kind, reason}]++
}

// A LaunchCount is how many VMs have been launched in a way.
type LaunchCount struct {
	Kind   string // clone, warm (a clone that had been waiting) or cold
	Reason string // why cold
	Count  uint64
}

// A TemplateStatus is a template as people see it.
type TemplateStatus struct {
	CPUs   int
	Memory int64  // bytes
	Tenant string // a namespace, if templates are not shared
	State  string // Wanted, Making, Ready or Failed
	Bytes  int64  // what it costs the host
	Uses   uint64
	Error  string // of the last attempt
}

// Launches counts the launches of this driver.
func (d *Driver) Launches() []LaunchCount {
	s := d.templates
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []LaunchCount
	for k, n := range s.launches {
		all = append(all, LaunchCount{k.kind, k.reason, n})
	}
	return all
}

// TemplateStatus tells of all templates that there are or are to be, and why
// there are none where there can be none.
func (d *Driver) TemplateStatus() (all []TemplateStatus, off string) {
	s := d.templates
	s.mu.Lock()
	defer s.mu.Unlock()
	for sh, e := range s.entries {
		if e.state == templateIdle {
			continue
		}
		st := TemplateStatus{CPUs: sh.cpus, Memory: sh.memory, Tenant: sh.tenant, State: string(e.state), Uses: e.uses}
		if e.t != nil {
			st.Bytes = used(e.t.ram)
		}
		if e.err != nil {
			st.Error = e.err.Error()
		}
		all = append(all, st)
	}
	return all, s.off
}
