package rest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// A fault is one kind of error of vSphere's Automation API: its error_type and
// the HTTP status that goes with it (vapi.std.errors, as the API's OpenAPI
// documents of vSphere 7.0 to 9.1 have them). An existing name is 400, not 409:
// that is what clients of vSphere look for.
type fault struct {
	kind   string
	status int
}

// Faults that the facade answers with.
var (
	faultAlreadyExists      = fault{"ALREADY_EXISTS", http.StatusBadRequest}
	faultConcurrentChange   = fault{"CONCURRENT_CHANGE", http.StatusConflict}
	faultError              = fault{"ERROR", http.StatusInternalServerError}
	faultInvalidArgument    = fault{"INVALID_ARGUMENT", http.StatusBadRequest}
	faultNotAllowedNow      = fault{"NOT_ALLOWED_IN_CURRENT_STATE", http.StatusBadRequest}
	faultNotFound           = fault{"NOT_FOUND", http.StatusNotFound}
	faultOperationNotFound  = fault{"OPERATION_NOT_FOUND", http.StatusNotFound}
	faultResourceInUse      = fault{"RESOURCE_IN_USE", http.StatusBadRequest}
	faultServiceUnavailable = fault{"SERVICE_UNAVAILABLE", http.StatusServiceUnavailable}
	faultTimedOut           = fault{"TIMED_OUT", http.StatusGatewayTimeout}
	faultUnauthenticated    = fault{"UNAUTHENTICATED", http.StatusUnauthorized}
	faultUnauthorized       = fault{"UNAUTHORIZED", http.StatusForbidden}
	faultUnexpectedInput    = fault{"UNEXPECTED_INPUT", http.StatusBadRequest}
	faultUnsupported        = fault{"UNSUPPORTED", http.StatusBadRequest}
)

// Errors that are one of errdefs' classes to whoever calls, but a fault of
// their own to the client.
var (
	errInUse             = fmt.Errorf("in use: %w", errdefs.ErrFailedPrecondition)
	errUnexpectedInput   = fmt.Errorf("unexpected input: %w", errdefs.ErrInvalidArgument)
	errOperationNotFound = fmt.Errorf("no such operation: %w", errdefs.ErrNotFound)
)

// A problem is a sentence for the client, with the class that decides its
// fault. The class is not part of the sentence.
type problem struct {
	text  string
	class error
}

func (p *problem) Error() string { return p.text }
func (p *problem) Unwrap() error { return p.class }

func problemf(class error, format string, args ...any) error {
	return &problem{text: fmt.Sprintf(format, args...), class: class}
}

// faultOf is the fault of an error. One of no class is ERROR.
func faultOf(err error) fault {
	switch {
	case errors.Is(err, errInUse):
		return faultResourceInUse
	case errors.Is(err, errUnexpectedInput):
		return faultUnexpectedInput
	case errors.Is(err, errOperationNotFound):
		return faultOperationNotFound
	case errdefs.IsUnauthorized(err):
		return faultUnauthenticated
	case errdefs.IsPermissionDenied(err):
		return faultUnauthorized
	case errdefs.IsAlreadyExists(err):
		return faultAlreadyExists
	case errdefs.IsNotFound(err):
		return faultNotFound
	case errdefs.IsNotImplemented(err):
		return faultUnsupported
	case errdefs.IsConflict(err), errdefs.IsAborted(err):
		return faultConcurrentChange
	case errdefs.IsFailedPrecondition(err):
		return faultNotAllowedNow
	case errdefs.IsInvalidArgument(err), errdefs.IsOutOfRange(err):
		return faultInvalidArgument
	case errdefs.IsDeadlineExceeded(err):
		return faultTimedOut
	case errdefs.IsUnavailable(err), errdefs.IsCanceled(err):
		return faultServiceUnavailable
	}
	return faultError
}

// kubernetesError gives an error of the API server its class. What object it is
// about stands in the API server's own sentence.
func kubernetesError(err error) error {
	class := func(c error) error { return &problem{text: err.Error(), class: c} }
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return class(errdefs.ErrNotFound)
	case apierrors.IsAlreadyExists(err):
		return class(errdefs.ErrAlreadyExists)
	case apierrors.IsConflict(err):
		return class(errdefs.ErrConflict)
	case apierrors.IsInvalid(err):
		return &problem{text: invalid(err), class: errdefs.ErrInvalidArgument}
	case apierrors.IsBadRequest(err), apierrors.IsRequestEntityTooLargeError(err):
		return class(errdefs.ErrInvalidArgument)
	case apierrors.IsForbidden(err):
		// Of the supervisor's own account, or of an admission policy: nothing
		// that a right of the user's in vSphere would change.
		return class(errdefs.ErrFailedPrecondition)
	case apierrors.IsTimeout(err), apierrors.IsServerTimeout(err), apierrors.IsTooManyRequests(err), apierrors.IsServiceUnavailable(err):
		return class(errdefs.ErrUnavailable)
	}
	var status apierrors.APIStatus
	if !errors.As(err, &status) && !errdefs.IsCanceled(err) && !errdefs.IsDeadlineExceeded(err) {
		return class(errdefs.ErrUnavailable) // it never reached the API server
	}
	return err
}

// invalid is what the schema of an object has against it. That rules were not
// looked at because of the rest is no news.
func invalid(err error) string {
	var status apierrors.APIStatus
	if !errors.As(err, &status) || status.Status().Details == nil {
		return err.Error()
	}
	var causes []string
	for _, c := range status.Status().Details.Causes {
		if c.Field != "<nil>" {
			causes = append(causes, c.Field+": "+c.Message)
		}
	}
	if len(causes) == 0 {
		return err.Error()
	}
	return strings.Join(causes, "; ")
}

// A message is vapi.std.LocalizableMessage.
type message struct {
	ID      string   `json:"id"`
	Default string   `json:"default_message"`
	Args    []string `json:"args"`
}

// messageOf is a message of Atoll's: the text is all there is to localise.
func messageOf(id, text string) message {
	return message{ID: "dev.atoll.namespaces." + id, Default: text, Args: []string{}}
}

// writeFault answers with an error in the shape of /api: error_type and
// messages. retry is only said where the same call may succeed later.
func writeFault(w http.ResponseWriter, err error) {
	f := faultOf(err)
	body := struct {
		Kind      string    `json:"error_type"`
		Messages  []message `json:"messages"`
		Challenge string    `json:"challenge,omitempty"`
	}{Kind: f.kind, Messages: []message{messageOf(messageID(f.kind), err.Error())}}
	switch f {
	case faultUnauthenticated:
		body.Challenge = challenge
		w.Header().Set("WWW-Authenticate", challenge)
	case faultServiceUnavailable:
		w.Header().Set("Retry-After", fmt.Sprint(int(retryAfter/time.Second)))
	}
	writeJSON(w, f.status, body)
}

const (
	challenge  = `Basic realm="VAPI endpoint"`
	retryAfter = 5 * time.Second
)

// messageID is an error_type as ids of messages are written.
func messageID(kind string) string {
	b := []byte(kind)
	for i, c := range b {
		switch {
		case c == '_':
			b[i] = '.'
		case 'A' <= c && c <= 'Z':
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil { // a value of this package's own types: cannot be
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b) // a client that is gone has nothing to be told
}
