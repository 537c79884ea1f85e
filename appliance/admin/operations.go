package admin

import "context"

// Operations is everything that a person or a script can do on a node. Page,
// command and API call it; appliance.Node does it. Every error that a caller
// should read is an *Error.
type Operations interface {
	Status(ctx context.Context) (Status, error)
	// Watch calls f with the status now and after each change, until ctx ends
	// or f returns false. Changes that come faster than f are joined.
	Watch(ctx context.Context, f func(Status) bool) error

	Init(ctx context.Context, r InitRequest) (InitResult, error)
	Join(ctx context.Context, r JoinRequest) error

	Users(ctx context.Context) ([]User, error)
	CreateUser(ctx context.Context, r UserChange) (User, error)
	ChangeUser(ctx context.Context, r UserChange) (User, error)
	DeleteUser(ctx context.Context, address string) error
	Groups(ctx context.Context) ([]Group, error)
	// PutGroup makes a group or replaces its members and settings.
	PutGroup(ctx context.Context, r Group) (Group, error)
	DeleteGroup(ctx context.Context, address string) error
	Aliases(ctx context.Context) ([]Alias, error)
	CreateAlias(ctx context.Context, r Alias) (Alias, error)
	DeleteAlias(ctx context.Context, address string) error

	Queue(ctx context.Context) ([]QueueEntry, error)
	QueueRetry(ctx context.Context, a QueueAction) (int, error)
	QueueHold(ctx context.Context, a QueueAction) (int, error)
	QueueRelease(ctx context.Context, a QueueAction) (int, error)
	// QueueDelete drops messages for good, without a report.
	QueueDelete(ctx context.Context, a QueueAction) (int, error)

	Tokens(ctx context.Context) ([]Token, error)
	CreateToken(ctx context.Context, r TokenRequest) (Token, error)
	RevokeToken(ctx context.Context, id string) error
	PendingNodes(ctx context.Context) ([]Pending, error)
	Approve(ctx context.Context, id string) error
	Refuse(ctx context.Context, id string) error
	ChangeNode(ctx context.Context, r NodeChange) error
	RevokeNode(ctx context.Context, name string) error
	Transfer(ctx context.Context, name string) error
	Promote(ctx context.Context, r PromoteRequest) (PromoteResult, error)
	Forked(ctx context.Context) ([]ForkedCommand, error)
	Settings(ctx context.Context) (Settings, error)
	ChangeSettings(ctx context.Context, r SettingsChange) (Settings, error)
}

// Actor is who asks.
type Actor struct {
	Name  string // address, or "local" for the control socket
	Admin bool   // may change things
}

type actorKey struct{}

// WithActor returns a context in which a acts.
func WithActor(ctx context.Context, a Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, a)
}

// ActorOf returns who acts in ctx; the zero Actor may do nothing.
func ActorOf(ctx context.Context) Actor {
	a, _ := ctx.Value(actorKey{}).(Actor)
	return a
}
