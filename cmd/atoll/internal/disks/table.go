package disks

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// A Style says which columns a table has.
type Style struct {
	// Namespaces shows those of the claims.
	Namespaces bool
	// Wide shows what is for those who look for something.
	Wide bool
}

// A column of the table.
type column struct {
	name string
	of   func(Disk) string
	show func(Style) bool // nil: always
}

var columns = []column{
	{"NAMESPACE", func(d Disk) string { return d.Namespace }, func(s Style) bool { return s.Namespaces }},
	{"PVC", func(d Disk) string { return d.PVC }, nil},
	{"POLICY", func(d Disk) string { return d.Policy }, nil},
	{"POD", func(d Disk) string { return d.Pod }, nil},
	{"VM", func(d Disk) string { return d.VM }, nil},
	{"DATASTORE", func(d Disk) string { return d.Datastore }, nil},
	{"SIZE", func(d Disk) string { return size(d.Size) }, nil},
	{"USED", func(d Disk) string { return size(d.Used) }, nil},
	{"FORMAT", func(d Disk) string { return d.format() }, nil},
	{"NODE", func(d Disk) string { return d.Node }, nil},
	{"COMPLIANCE", func(d Disk) string { return d.compliance() }, func(s Style) bool { return s.Wide }},
	{"PV", func(d Disk) string { return d.PV }, func(s Style) bool { return s.Wide }},
	{"ID", func(d Disk) string { return d.ID }, func(s Style) bool { return s.Wide }},
	{"STATE", func(d Disk) string { return d.state() }, nil},
}

// Table writes disks as a table.
func Table(w io.Writer, disks []Disk, style Style) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var shown []column
	var names []string
	for _, c := range columns {
		if c.show == nil || c.show(style) {
			shown, names = append(shown, c), append(names, c.name)
		}
	}
	fmt.Fprintln(t, strings.Join(names, "\t"))
	for _, d := range disks {
		cells := make([]string, len(shown))
		for i, c := range shown {
			if cells[i] = plain(c.of(d)); cells[i] == "" {
				cells[i] = "-"
			}
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	return t.Flush()
}

// plain keeps a text in its cell.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

func (d Disk) format() string {
	if d.Encrypted {
		return d.Format + ",encrypted"
	}
	return d.Format
}

func (d Disk) state() string {
	if d.Reason != "" {
		return d.State + ": " + d.Reason
	}
	return d.State
}

func (d Disk) compliance() string {
	if d.ComplianceReason != "" {
		return d.Compliance + ": " + d.ComplianceReason
	}
	return d.Compliance
}

// size is bytes as people write them in claims, three digits of them.
func size(bytes *int64) string {
	if bytes == nil {
		return ""
	}
	v, unit := float64(*bytes), ""
	for _, u := range []string{"Ki", "Mi", "Gi", "Ti", "Pi"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	if v >= 100 || v == float64(int64(v)) {
		return fmt.Sprintf("%.0f%s", v, unit)
	}
	return fmt.Sprintf("%.1f%s", v, unit)
}
