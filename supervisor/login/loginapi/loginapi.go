// Package loginapi is what the login server and its clients say to each other
// over HTTPS. Paths and fields are those of VMware's Supervisor, where it has
// them, so that scripts written for it need another port and nothing else.
//
//	POST /wcp/login      name and password (Basic) → Login
//	GET  /wcp/workloads  token (Bearer) → []Workload
//	POST /wcp/logout     token (Bearer) → 204; the token is good no more
//	GET  /jwks           → the public keys that tokens are signed with (RFC 7517)
//
// Anything but 2xx comes with an Error.
package loginapi

import "time"

// DefaultPort of the login server, next to the API server's.
const DefaultPort = 6444

// Paths.
const (
	LoginPath     = "/wcp/login"
	WorkloadsPath = "/wcp/workloads"
	LogoutPath    = "/wcp/logout"
	KeysPath      = "/jwks"
)

// A Login is the answer to a name and a password that are right.
type Login struct {
	Token   string    `json:"session_id"` // a JWT; a secret
	Expires time.Time `json:"expires"`
	User    string    `json:"user"`             // NAME@DOMAIN
	Groups  []string  `json:"groups,omitempty"` // NAME@DOMAIN
	// Warning is a sentence for the user: something is not as it should be.
	Warning string `json:"warning,omitempty"`
	// APIServerPort is on the host that the client asked.
	APIServerPort uint16 `json:"api_server_port"`
	// CertificateAuthority of the API server, PEM.
	CertificateAuthority string `json:"certificate_authority"`
}

// A Workload is a namespace that the user may use.
type Workload struct {
	Namespace     string `json:"namespace"`
	MasterHost    string `json:"master_host"`
	APIServerPort string `json:"control_plane_api_server_port"`
}

// An Error says what is wrong and what helps.
type Error struct {
	Message string `json:"message"`
}
