package agentapi

import (
	"context"
	"fmt"
	"io"
	"iter"
	"time"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// follow yields the records of one journal stream until it ends.
func follow[T any, P interface {
	*T
	proto.Message
}](ctx context.Context, c *Client, h *StreamHeader) iter.Seq2[P, error] {
	return func(yield func(P, error) bool) {
		s, err := c.open(ctx, h)
		if err != nil {
			yield(nil, err)
			return
		}
		defer s.Close()
		defer context.AfterFunc(ctx, func() { s.SetReadDeadline(time.Unix(1, 0)) })()
		for {
			rec := P(new(T))
			err := s.receive(rec)
			if err == io.EOF {
				return
			}
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(nil, fmt.Errorf("agent stream %s: %w", h.Kind, err))
				return
			}
			if !yield(rec, nil) {
				return
			}
		}
	}
}

// fromStatusProto makes the error of a call that the guest refused.
func fromStatusProto(method string, s *spb.Status) error {
	return fmt.Errorf("agent %s: %w", method, fromCode(codes.Code(s.Code), s.Message))
}
