! As numbers.c, through fastmaf.f90.
program numbers
    use, intrinsic :: iso_fortran_env, only: int32, int64, real64
    use fastmaf
    implicit none
    type(flow_model) :: model
    type(flow_evaluator) :: flow
    character(len=1000) :: flow_file, input, output, text
    integer :: n, features, contexts, from, to, stat, i
    real(real64), allocatable :: x(:, :), context(:, :), log_prob(:), d_x(:, :), d_context(:, :), noise(:, :)
    real(real64), allocatable :: samples(:, :, :), density(:, :)

    call get_command_argument(1, flow_file)
    call get_command_argument(2, input)
    call get_command_argument(3, output)
    call get_command_argument(4, text)
    read (text, *) n
    call model%open("/no/such/file", stat, text)
    if (stat /= fastmaf_cannot_read .or. index(text, "/no/such/file") == 0) error stop 7
    call model%open(trim(flow_file))
    call flow%create(model)
    features = int(model%features())
    contexts = int(model%context_features())
    allocate (x(features, n), context(contexts, n), log_prob(n), d_x(features, n), d_context(contexts, n), noise(features, n))
    allocate (samples(features, 1, n), density(1, n))
    open (newunit=from, file=trim(input), access="stream", form="unformatted", status="old")
    read (from) x, context
    close (from)
    open (newunit=to, file=trim(output), access="stream", form="unformatted", status="replace")
    if (contexts > 0) then
        call flow%log_prob(x, log_prob, context)
        write (to) log_prob
        call flow%log_prob_and_grad(x, log_prob, d_x, context, d_context)
        write (to) log_prob, d_x, d_context
        call flow%to_noise(x, noise, context)
        write (to) noise
        call flow%from_noise(noise, x, context)
        write (to) x
        call flow%sample(samples, context, seed=7_int64, offset=5_int64, context_offset=3_int32, log_prob=density)
    else
        call flow%log_prob(x, log_prob)
        write (to) log_prob
        call flow%log_prob_and_grad(x, log_prob, d_x)
        write (to) log_prob, d_x
        call flow%to_noise(x, noise)
        write (to) noise
        call flow%from_noise(noise, x)
        write (to) x
        do i = 1, n
            call flow%sample(samples(:, :, i), seed=7_int64, offset=5_int64, context_offset=int(2 + i, int32), &
                log_prob=density(:, i))
        end do
    end if
    write (to) samples, density
    close (to)
    call flow%log_prob(x(2:, :), log_prob, stat=stat, errmsg=text)
    if (stat /= fastmaf_invalid_argument) error stop 8
end program
