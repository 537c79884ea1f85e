// Package api carries admin.Operations over HTTP: one table of calls that the
// server side serves (on the control socket and under /api/v1 of the pages) and
// the client side, which the command line uses, speaks.
//
// Reads are GET, everything else is POST with a JSON body. Errors are
// {"code","text","next"} with the status of their kind.
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"posthouse/appliance/admin"
)

// Prefix stands before every path.
const Prefix = "/api/v1/"

// maxRequest bounds a request body, in bytes; a group of 10,000 fits.
const maxRequest = 4 << 20

// none is the request or answer of a call that has none.
type none struct{}

// named is the request of calls that name one thing.
type named struct {
	Name string `json:"name"`
}

// counted is the answer of calls that act on several things.
type counted struct {
	Count int `json:"count"`
}

// Handler serves ops. The caller has put the actor into each request's context;
// a read needs any actor with a name, a change needs an admin.
func Handler(ops admin.Operations) http.Handler {
	mux := http.NewServeMux()
	read(mux, "status", func(ctx context.Context, _ none) (admin.Status, error) { return ops.Status(ctx) })
	read(mux, "users", func(ctx context.Context, _ none) ([]admin.User, error) { return ops.Users(ctx) })
	read(mux, "groups", func(ctx context.Context, _ none) ([]admin.Group, error) { return ops.Groups(ctx) })
	read(mux, "aliases", func(ctx context.Context, _ none) ([]admin.Alias, error) { return ops.Aliases(ctx) })
	read(mux, "queue", func(ctx context.Context, _ none) ([]admin.QueueEntry, error) { return ops.Queue(ctx) })
	read(mux, "mesh/tokens", func(ctx context.Context, _ none) ([]admin.Token, error) { return ops.Tokens(ctx) })
	read(mux, "mesh/pending", func(ctx context.Context, _ none) ([]admin.Pending, error) { return ops.PendingNodes(ctx) })
	read(mux, "mesh/forked", func(ctx context.Context, _ none) ([]admin.ForkedCommand, error) { return ops.Forked(ctx) })
	read(mux, "mesh/settings", func(ctx context.Context, _ none) (admin.Settings, error) { return ops.Settings(ctx) })

	change(mux, "mesh/settings", ops.ChangeSettings)
	change(mux, "init", ops.Init)
	change(mux, "join", done(ops.Join))
	change(mux, "users/create", ops.CreateUser)
	change(mux, "users/change", ops.ChangeUser)
	change(mux, "users/delete", byName(ops.DeleteUser))
	change(mux, "groups/put", ops.PutGroup)
	change(mux, "groups/delete", byName(ops.DeleteGroup))
	change(mux, "aliases/create", ops.CreateAlias)
	change(mux, "aliases/delete", byName(ops.DeleteAlias))
	change(mux, "queue/retry", count(ops.QueueRetry))
	change(mux, "queue/hold", count(ops.QueueHold))
	change(mux, "queue/release", count(ops.QueueRelease))
	change(mux, "queue/delete", count(ops.QueueDelete))
	change(mux, "mesh/tokens/create", ops.CreateToken)
	change(mux, "mesh/tokens/revoke", byName(ops.RevokeToken))
	change(mux, "mesh/approve", byName(ops.Approve))
	change(mux, "mesh/refuse", byName(ops.Refuse))
	change(mux, "mesh/node", done(ops.ChangeNode))
	change(mux, "mesh/revoke", byName(ops.RevokeNode))
	change(mux, "mesh/transfer", byName(ops.Transfer))
	change(mux, "mesh/promote", ops.Promote)
	mux.HandleFunc("GET "+Prefix+"events", func(w http.ResponseWriter, r *http.Request) { events(ops, w, r) })
	return mux
}

func byName(f func(context.Context, string) error) func(context.Context, named) (none, error) {
	return func(ctx context.Context, q named) (none, error) { return none{}, f(ctx, q.Name) }
}

func done[Q any](f func(context.Context, Q) error) func(context.Context, Q) (none, error) {
	return func(ctx context.Context, q Q) (none, error) { return none{}, f(ctx, q) }
}

func count(f func(context.Context, admin.QueueAction) (int, error)) func(context.Context, admin.QueueAction) (counted, error) {
	return func(ctx context.Context, q admin.QueueAction) (counted, error) {
		n, err := f(ctx, q)
		return counted{n}, err
	}
}

func read[R any](mux *http.ServeMux, path string, f func(context.Context, none) (R, error)) {
	mux.HandleFunc("GET "+Prefix+path, func(w http.ResponseWriter, r *http.Request) {
		if admin.ActorOf(r.Context()).Name == "" {
			fail(w, admin.Errorf(admin.Denied, "denied", "Log in first."))
			return
		}
		a, err := f(r.Context(), none{})
		answer(w, a, err)
	})
}

func change[Q, R any](mux *http.ServeMux, path string, f func(context.Context, Q) (R, error)) {
	mux.HandleFunc("POST "+Prefix+path, func(w http.ResponseWriter, r *http.Request) {
		if !admin.ActorOf(r.Context()).Admin {
			fail(w, admin.Errorf(admin.Denied, "denied", "Only a mesh admin may do this."))
			return
		}
		var q Q
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
		d.DisallowUnknownFields()
		if err := d.Decode(&q); err != nil && !errors.Is(err, io.EOF) {
			fail(w, admin.Errorf(admin.Usage, "request", "The request is not what %s takes: %v.", path, err))
			return
		}
		a, err := f(r.Context(), q)
		answer(w, a, err)
	})
}

func answer(w http.ResponseWriter, a any, err error) {
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.Encode(a) // an error here is the client's line: nobody is left to tell
}

func fail(w http.ResponseWriter, err error) {
	var e *admin.Error
	if !errors.As(err, &e) {
		e = &admin.Error{Kind: admin.Internal, Code: "internal", Text: err.Error() + "."}
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(e.Kind.HTTP())
	json.NewEncoder(w).Encode(e)
}

// events is the live status as server-sent events, one JSON status each.
func events(ops admin.Operations, w http.ResponseWriter, r *http.Request) {
	if admin.ActorOf(r.Context()).Name == "" {
		fail(w, admin.Errorf(admin.Denied, "denied", "Log in first."))
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	rc := http.NewResponseController(w)
	ops.Watch(r.Context(), func(s admin.Status) bool {
		b, err := json.Marshal(s)
		if err != nil {
			return false
		}
		if _, err := fmt.Fprintf(w, "event: status\ndata: %s\n\n", b); err != nil {
			return false
		}
		return rc.Flush() == nil
	})
}
